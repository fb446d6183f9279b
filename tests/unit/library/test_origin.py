"""What an adapter says about its base: another adapter, or a folder that cannot be read."""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest

from lorary.errors import BaseModelError
from lorary.library.store import Library

STACKED = r"must have been trained on a base model, not on top of another adapter"


def naming(folder: Path, base: object) -> Path:
    """Let an adapter name a base."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    return folder


@pytest.fixture
def second(source: Path) -> Path:
    """Another adapter beside the first, `sst2`."""
    return Path(shutil.copytree(source, source.parent / "second"))


def check_refused_unless_forced(library: Library, folder: Path, found: str) -> None:
    before = library.names()
    with pytest.raises(BaseModelError, match=rf"{STACKED}\nfound: .*{found}"):
        library.add(folder)
    assert library.names() == before
    with pytest.warns(UserWarning, match="trained on top of"):
        library.add(folder, force_base=True)


@pytest.mark.parametrize("relative", [False, True])
def test_an_adapter_on_top_of_an_adapters_folder_is_refused_unless_forced(
    library: Library, source: Path, second: Path, relative: bool
) -> None:
    naming(second, "../sst2" if relative else str(source))
    check_refused_unless_forced(library, second, "the folder of an adapter")


def test_one_that_peft_trained_on_a_merged_adapter_is_refused_by_the_folder_it_names(
    library: Library, source: Path, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = peft.PeftModel.from_pretrained(tiny_model(), str(source)).merge_and_unload()
    model.name_or_path = str(source)
    stacked = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT misses a configuration of a whole model there
        stacked.save_pretrained(str(tmp_path / "stacked"))
    check_refused_unless_forced(library, tmp_path / "stacked", "the folder of an adapter")


@pytest.mark.parametrize("name", ["sst2", "user/sst2", "/moved/lib/adapters/sst2", "/moved/lib/adapters/sst2/"])
def test_an_adapter_that_names_one_of_the_library_is_refused_unless_forced(
    library: Library, source: Path, second: Path, tmp_path: Path, name: str
) -> None:
    library.add(source)
    far = Path(shutil.copytree(second, tmp_path / "far" / "second"))
    check_refused_unless_forced(library, naming(far, name), "the adapter 'sst2' of this library")


def test_an_adapter_on_an_adapter_of_the_hub_is_refused_by_its_copy_here(
    library: Library, second: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cached(repo: str, file: str) -> str | None:
        return str(source / file) if repo == "user/tuned" else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    check_refused_unless_forced(library, naming(second, "user/tuned"), "adapter user/tuned of the Hub")


def test_a_chain_is_refused_at_its_last_link(library: Library, source: Path, second: Path, tmp_path: Path) -> None:
    third = Path(shutil.copytree(second, tmp_path / "third"))
    check_refused_unless_forced(library, naming(third, str(naming(second, str(source)))), "second")


def test_what_a_provenance_says_does_not_hide_it(library: Library, source: Path, second: Path, tmp_path: Path) -> None:
    library.add(naming(second, str(source)), force_base=True) if False else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.add(naming(second, str(source)), force_base=True)
    other = Library.create(tmp_path / "other", library.base.name)
    check_refused_unless_forced(other, library.path / "adapters" / "second", "the folder of an adapter")


@pytest.mark.parametrize(
    "name", [None, "", "user/llama", "/gone/base", "~nobody-of-this-name/base", "\0", "a" * 5000, 7, ["x"], {"a": 1}]
)
def test_a_base_that_cannot_be_looked_at_is_taken_with_a_warning_at_most(
    library: Library, second: Path, name: object
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*cannot be compared with the library's base")
        library.add(naming(second, name))


def break_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def config_of(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "config.json").write_text(text)

    return write


@pytest.mark.parametrize(
    "damage",
    [
        break_weights,
        cut_weights,
        config_of(""),
        config_of("[]"),
        config_of("{}"),
        config_of("\0\1"),
        config_of('{"model_type": 7}'),
        config_of('{"model_type": "no_such"}'),
        config_of('{"model_type": "bert", "is_decoder": false}'),
        config_of('{"model_type": "llama", "hidden_size": "32"}'),
        config_of('{"model_type": "llama", "hidden_size": -1}'),
        config_of('{"model_type": "llama", "num_attention_heads": 0, "hidden_size": 32}'),
        config_of('{"model_type": "gpt2", "n_embd": null}'),
        config_of('{"model_type": "llama", "vocab_size": 1e400}'),
        config_of('{"model_type": "llama", "rope_scaling": 7}'),
        config_of("[" * 100_000),
    ],
)
def test_a_base_folder_that_cannot_be_read_passes_by_force_alone(
    library: Library, second: Path, tiny_base_folder: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = Path(shutil.copytree(tiny_base_folder, tmp_path / "broken"))
    damage(folder)
    naming(second, str(folder))
    with pytest.raises(BaseModelError, match=r"must be readable to be compared(?s:.)*--force-base"):
        library.add(second)
    assert library.names() == []
    with pytest.warns(UserWarning, match="cannot be read, and so not be compared"):
        library.add(second, force_base=True)


def test_a_base_folder_that_may_not_be_looked_into_is_taken_with_a_warning(
    library: Library, second: Path, tiny_base_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_base_folder, tmp_path / "closed"))
    naming(second, str(folder))
    os.chmod(folder, 0)
    try:
        if os.access(folder / "config.json", os.R_OK):
            pytest.skip("this user may read everything")
        with pytest.warns(UserWarning, match="cannot be compared"):
            library.add(second)
    finally:
        os.chmod(folder, 0o755)


def test_a_base_of_the_hub_is_compared_by_its_copy_here(
    library: Library,
    source: Path,
    second: Path,
    tiny_base_folder: Path,
    tiny_model: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = Path(shutil.copytree(tiny_base_folder, tmp_path / "snapshots" / "other"))
    tiny_model(seed=5).save_pretrained(other)
    places = {"mirror/same": tiny_base_folder, "mirror/other": other}

    def cached(repo: str, file: str) -> str | None:
        place = places.get(repo)
        return str(place / file) if place and (place / file).is_file() else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        library.add(naming(source, "mirror/same"))
    with pytest.raises(BaseModelError, match="mirror/other by its copy here"):
        library.add(naming(second, "mirror/other"))
    with pytest.warns(UserWarning, match="cannot be compared"):
        library.add(naming(second, "mirror/absent"))


def test_the_embedded_base_and_other_spellings_of_a_hub_id_are_the_base(
    source: Path, second: Path, tiny_base_folder: Path, tmp_path: Path
) -> None:
    for base, called in (("embedded", "HuggingFaceTB/SmolLM2-135M-Instruct"), ("Org/Base", "org/base")):
        library = Library.create(tmp_path / called.partition("/")[0], tiny_base_folder, base_name=base)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            library.add(naming(source, called))
        with pytest.warns(UserWarning, match="cannot be compared"):
            library.add(naming(second, "org/another"))
