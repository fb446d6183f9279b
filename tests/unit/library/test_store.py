"""The library: what goes in comes out, names are safe, bases are checked, and nothing enters half."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from jaxtyping import TypeCheckError
from tests.support.adapters import write_adapter

from lorary.adapter import Adapter, LoraFactors, content_hash
from lorary.errors import AdapterError, BaseModelError, LibraryError, RouterError, UsageError
from lorary.formats.peft import read_adapter
from lorary.formats.peft_config import new_config
from lorary.library.store import Library

MakeAdapter = Callable[..., Adapter]
FILES = ("adapter_config.json", "adapter_model.safetensors")
BAD_NAMES = ["../x", "a/b", "", "nul\0", ".", "..", ".hidden", "-rf", "a b", "é", "x" * 129, "a\n"]


def tree(folder: Path) -> dict[str, bytes]:
    """Everything in a folder but the locks, by relative path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith(".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_new_library_is_empty_and_opens_again(library: Library, tiny_base_folder: Path) -> None:
    again = Library.open(library.path)
    assert (len(again), list(again), again.names(), again.describe(), again.verify()) == (0, [], [], [], [])
    assert again.base == library.base
    assert again.base.name == str(tiny_base_folder)
    assert again.name == "lib"
    assert "adapters=0" in repr(again)


def test_both_files_are_copied_byte_for_byte(library: Library, source: Path) -> None:
    text = (source / "adapter_config.json").read_text()
    (source / "adapter_config.json").write_text("\n " + text + "\n\n")
    assert library.add(source) == "sst2"
    for file in FILES:
        assert (library.path / "adapters" / "sst2" / file).read_bytes() == (source / file).read_bytes()
    assert sorted(tree(library.path)) == [
        *(f"adapters/sst2/{file}" for file in (*FILES, "provenance.json")),
        "library.json",
    ]
    assert library.verify() == []


def test_an_adapter_from_memory_comes_back_equal(library: Library, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter("x", 0.5)
    assert library.add_adapter(adapter, {"tasks": ["t"], "seed": 3}) == "x"
    found = library.get("x")
    assert dict(found.config) == dict(adapter.config)
    for path, factors in adapter:
        assert torch.equal(found.modules[path].lora_a, factors.lora_a)
        assert torch.equal(found.modules[path].lora_b, factors.lora_b)
        assert found.modules[path].scaling == factors.scaling
    assert "x" in library
    assert "y" not in library
    assert library.verify() == []


def test_an_adapter_in_a_library_loads_in_peft(
    library: Library, make_adapter: MakeAdapter, tiny_model: Callable[..., Any]
) -> None:
    library.add_adapter(make_adapter("x", 0.5), {})
    model = peft.PeftModel.from_pretrained(tiny_model(), str(library.path), subfolder="adapters/x")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert torch.equal(layer.lora_A["default"].weight, torch.full((2, 32), 0.5))
    assert layer.scaling["default"] == 2.0


def test_names_come_in_one_order_whatever_the_order_of_adding(library: Library, make_adapter: MakeAdapter) -> None:
    for name in ("b", "B2", "a", "10", "9"):
        library.add_adapter(make_adapter(name), {})
    assert library.names() == list(library) == ["10", "9", "B2", "a", "b"]


def test_equal_builds_are_equal_bytes_in_any_order(
    tmp_path: Path, tiny_base_folder: Path, make_adapter: MakeAdapter
) -> None:
    for folder, names in {"one": ["a", "b"], "two": ["b", "a"]}.items():
        library = Library.create(tmp_path / folder, tiny_base_folder)
        for name in names:
            library.add_adapter(make_adapter(name), {"tasks": [name], "settings": {"steps": 3}})
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_provenance_says_what_the_adapter_is_and_what_its_builder_told(
    library: Library, make_adapter: MakeAdapter
) -> None:
    adapter = make_adapter("x")
    library.add_adapter(adapter, {"tasks": ["a", "b"], "seed": 7, "metrics": {"loss": 0.25}})
    provenance, stored = library.provenance("x"), library.get("x")
    assert provenance["tasks"] == ["a", "b"]
    assert (provenance["seed"], provenance["metrics"]) == (7, {"loss": 0.25})
    assert provenance["base"] == {"name": library.base.name, "fingerprint": library.base.fingerprint.digest}
    assert provenance["content_hash"] == content_hash(stored.config, stored.tensors)
    assert sorted(provenance["files"]) == sorted(FILES)
    assert (provenance["rank"], provenance["num_parameters"]) == (2, 256)


def test_describing_reads_no_weights(library: Library, make_adapter: MakeAdapter) -> None:
    library.add_adapter(make_adapter("x"), {"tasks": ["t"]})
    expected = [
        {"name": "x", "tasks": ["t"], "rank": 2, "num_parameters": 256, "hash": library.provenance("x")["content_hash"]}
    ]
    (library.path / "adapters" / "x" / "adapter_model.safetensors").unlink()
    assert library.describe() == expected


@pytest.mark.parametrize("key", ["base", "content_hash", "files", "num_parameters", "rank"])
def test_a_builder_cannot_set_what_the_library_computes(library: Library, make_adapter: MakeAdapter, key: str) -> None:
    with pytest.raises(UsageError, match="may not set what the library computes"):
        library.add_adapter(make_adapter("x"), {key: 1})
    assert len(library) == 0


def test_tasks_must_be_a_list_of_names(library: Library, make_adapter: MakeAdapter) -> None:
    with pytest.raises(UsageError, match="tasks as a list of names"):
        library.add_adapter(make_adapter("x"), {"tasks": "sst2"})


def test_an_import_between_libraries_keeps_what_the_builder_told(
    library: Library, tmp_path: Path, tiny_base_folder: Path, make_adapter: MakeAdapter
) -> None:
    other = Library.create(tmp_path / "other", tiny_base_folder)
    other.add_adapter(make_adapter("x"), {"tasks": ["t"], "seed": 7})
    library.add(other.path / "adapters" / "x", "y")
    provenance = library.provenance("y")
    assert (provenance["tasks"], provenance["seed"], provenance["source"]) == (["t"], 7, "x")
    assert provenance["source_base"] == other.provenance("x")["base"]


def test_an_import_without_provenance_has_no_tasks_and_names_its_source(library: Library, source: Path) -> None:
    library.add(source, "other")
    assert (library.provenance("other")["tasks"], library.provenance("other")["source"]) == ([], "sst2")


def test_provenance_of_other_weights_is_refused(library: Library, source: Path, make_adapter: MakeAdapter) -> None:
    library.add(source)
    shutil.copy(library.path / "adapters" / "sst2" / "provenance.json", source)
    write_adapter(make_adapter("sst2", 2.0), source)
    with pytest.raises(LibraryError, match="beside adapter 'y' must describe its weights"):
        library.add(source, "y")


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_is_none_is_refused_before_anything_is_touched(
    library: Library, source: Path, make_adapter: MakeAdapter, name: str
) -> None:
    before = tree(library.path.parent)
    for act in (
        lambda: library.add(source, name),
        lambda: library.replace(source, name),
        lambda: library.add_adapter(make_adapter(name), {}),
        lambda: library.replace_adapter(make_adapter(name), {}),
        lambda: library.remove(name),
        lambda: library.get(name),
        lambda: library.provenance(name),
    ):
        with pytest.raises(UsageError, match="the name of an adapter must be"):
            act()
    assert tree(library.path.parent) == before


@pytest.mark.parametrize("name", ["sst2", "SST2"])
def test_a_name_that_is_taken_is_refused_with_the_remedy(library: Library, source: Path, name: str) -> None:
    library.add(source)
    before = tree(library.path)
    with pytest.raises(LibraryError, match=r"(?s)taken by 'sst2'.*replace.*--name"):
        library.add(source, name)
    assert tree(library.path) == before


def test_replacing_puts_the_new_in_place_of_the_old(library: Library, source: Path, make_adapter: MakeAdapter) -> None:
    library.add(source)
    library.replace_adapter(make_adapter("sst2", 3.0), {"tasks": ["t"]})
    assert float(library.get("sst2").modules["model.layers.0.self_attn.q_proj"].lora_a[0, 0]) == 3.0
    assert library.replace(source) == "sst2"
    assert float(library.get("sst2").modules["model.layers.0.self_attn.q_proj"].lora_a[0, 0]) == 1.0
    assert library.provenance("sst2")["tasks"] == []
    assert library.verify() == []
    assert not (library.path / ".staging").exists()


def test_what_is_not_there_cannot_be_replaced_removed_or_read(library: Library, source: Path) -> None:
    for act in (library.replace, lambda _: library.remove("sst2"), lambda _: library.get("sst2")):
        with pytest.raises(LibraryError, match="no adapter 'sst2'"):
            act(source)


def test_a_removed_adapter_is_gone(library: Library, source: Path) -> None:
    before = tree(library.path)
    library.add(source)
    library.remove("sst2")
    assert library.names() == []
    assert tree(library.path) == before


def test_a_source_that_is_no_folder_is_wrong_usage(library: Library, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must be a folder"):
        library.add(tmp_path / "nothing")


def test_a_damaged_source_leaves_the_library_as_it_was(library: Library, source: Path) -> None:
    before = tree(library.path)
    weights = (source / "adapter_model.safetensors").read_bytes()
    (source / "adapter_model.safetensors").write_bytes(weights[:-1])
    with pytest.raises(AdapterError, match="whole safetensors file"):
        library.add(source)
    assert tree(library.path) == before


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("model.layers.9.self_attn.q_proj", "the base has no linear layer there"),
        ("model.layers.0.self_attn.k_proj", r"the base has \(d_in, d_out\) \(32, 16\)"),
        ("model.norm", "the base has no linear layer there"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_with_layer_and_shapes(library: Library, path: str, found: str) -> None:
    modules = {path: LoraFactors(torch.ones(2, 32), torch.ones(32, 2), 2.0)}
    adapter = Adapter("x", modules, new_config(None, rank=2, alpha=4, target_modules=[path]))
    with pytest.raises(AdapterError, match=rf"(?s)adapter 'x' must fit .* at {path}.*\(32, 32\), {found}"):
        library.add_adapter(adapter, {})
    assert len(library) == 0


def named_base(folder: Path, name: str) -> Path:
    document = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**document, "base_model_name_or_path": name}))
    return folder


@pytest.fixture
def stranger(tmp_path: Path, tiny_model: Callable[..., Any]) -> Path:
    """A base of the same shapes with unrelated weights."""
    tiny_model(seed=1).save_pretrained(tmp_path / "stranger")
    return tmp_path / "stranger"


def test_an_adapter_that_names_the_librarys_base_is_taken(
    library: Library, source: Path, tiny_base_folder: Path, tmp_path: Path
) -> None:
    library.add(named_base(source, library.base.name), "a")
    shutil.copytree(tiny_base_folder, tmp_path / "copy")
    library.add(named_base(source, str(tmp_path / "copy")), "b")


def test_an_adapter_of_a_base_that_cannot_be_checked_is_taken_with_a_warning(library: Library, source: Path) -> None:
    with pytest.warns(UserWarning, match="adapter 'sst2' is 'user/model' by its configuration"):
        library.add(named_base(source, "user/model"))
    assert library.names() == ["sst2"]


def test_an_adapter_of_unrelated_weights_is_refused_unless_forced(
    library: Library, source: Path, stranger: Path
) -> None:
    named_base(source, str(stranger))
    with pytest.raises(BaseModelError, match=r"(?s)base model of adapter 'sst2'.*unrelated values.*--force-base"):
        library.add(source)
    with pytest.warns(UserWarning, match="is unrelated to the library's base model"):
        library.add(source, force_base=True)


def test_an_adapter_whose_provenance_records_another_base_is_refused_unless_forced(
    library: Library, stranger: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    other = Library.create(tmp_path / "other", stranger)
    other.add_adapter(make_adapter("x"), {})
    with pytest.raises(BaseModelError, match="with another fingerprint"):
        library.add(other.path / "adapters" / "x")
    library.add(other.path / "adapters" / "x", force_base=True)
    assert library.verify() == []


def test_a_live_base_is_checked_against_the_recorded_one(library: Library, tiny_model: Callable[..., Any]) -> None:
    library.check_base(tiny_model())
    with pytest.raises(BaseModelError, match="architecture and shapes"):
        library.check_base(tiny_model(intermediate_size=64), force_base=True)
    with pytest.raises(BaseModelError, match="unrelated values"):
        library.check_base(tiny_model(seed=1))
    with pytest.warns(UserWarning, match="unrelated to"):
        library.check_base(tiny_model(seed=1), force_base=True)
    with pytest.warns(UserWarning, match="rounded to bfloat16: nothing is wrong") as warned:
        library.check_base(tiny_model(dtype=torch.bfloat16))
    assert len(warned) == 1


def test_a_library_can_be_made_over_a_live_model(tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    library = Library.create(tmp_path / "lib", tiny_model(), base_name="mine")
    assert (library.base.name, library.base.revision) == ("mine", None)
    assert Library.create(tmp_path / "other", tiny_model()).base.name == "LlamaForCausalLM"
    library.check_base(tiny_model())


def test_the_default_router_is_kept_and_checked(library: Library) -> None:
    assert library.default_router == {"router": "arrow", "top_k": 4, "temperature": 1.0, "mix": "outputs"}
    settings = {"router": "uniform", "top_k": 2, "temperature": 0.5, "mix": "factors"}
    library.set_default_router(settings)
    assert library.default_router == Library.open(library.path).default_router == settings
    for wrong in ({"top_k": 0}, {"temperature": 0.0}, {"mix": "both"}, {"router": ""}, {"top_k": True}, {"more": 1}):
        # The type checker of the tests refuses a word before the check does.
        with pytest.raises((UsageError, RouterError, TypeCheckError), match=next(iter(wrong))):
            library.set_default_router({**settings, **wrong})
    with pytest.raises(UsageError, match="must have router, top_k, temperature, mix\nfound: mix is missing"):
        library.set_default_router({key: value for key, value in settings.items() if key != "mix"})
    with pytest.raises(UsageError, match="calibrated scores are for routers by norm"):
        library.set_default_router({**settings, "router": "arrow", "calibrated": True})
    assert Library.open(library.path).default_router == settings


@pytest.mark.parametrize("path", ["hf://user/repo", "s3://bucket/lib"])
def test_a_library_is_not_made_at_a_remote(path: str) -> None:
    with pytest.raises(UsageError, match="must be a local folder"):
        Library.create(path)


def test_an_adapters_folder_that_cannot_be_read_is_an_error_and_no_empty_library(library: Library) -> None:
    (library.path / "adapters").write_text("")
    with pytest.raises(LibraryError, match="adapters must be readable"):
        library.names()


def test_a_path_that_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, found in {"nothing": "nothing is there", "file": "it is a file", ".": "no library.json"}.items():
        with pytest.raises(LibraryError, match=found):
            Library.open(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must hold one JSON object"),
        ("[]", "must hold one JSON object"),
        ("{}", "format_version is None"),
        ('{"format_version": 2}', "(?s)version 2.*upgrade"),
        ('{"format_version": 1}', "KeyError: 'base'"),
        ('{"format_version": 1, "base": null}', "restore it from a copy"),
    ],
)
def test_a_damaged_or_future_library_is_refused_with_the_remedy(library: Library, text: str, message: str) -> None:
    (library.path / "library.json").write_text(text)
    with pytest.raises(LibraryError, match=message):
        Library.open(library.path)


def test_a_fingerprint_that_was_edited_is_refused(library: Library) -> None:
    document = json.loads((library.path / "library.json").read_text())
    document["base"]["fingerprint"]["architecture"] = "Other"
    (library.path / "library.json").write_text(json.dumps(document))
    with pytest.raises(LibraryError, match="the fingerprint's digest"):
        Library.open(library.path)


def test_a_library_is_never_made_over_something_else(tmp_path: Path, library: Library, tiny_base_folder: Path) -> None:
    (tmp_path / "file").touch()
    for path, found in ((library.path, "is a library already"), (tmp_path / "file", "is a file"), (tmp_path, "holds")):
        with pytest.raises(LibraryError, match=found):
            Library.create(path, tiny_base_folder)


def test_an_empty_folder_becomes_a_library(tmp_path: Path, tiny_base_folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert len(Library.create(tmp_path / "empty", tiny_base_folder)) == 0


def test_a_base_that_is_no_model_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "of_tomorrow"}')
    with pytest.raises(BaseModelError):
        Library.create(tmp_path / "lib", tmp_path / "base")
    assert not (tmp_path / "lib").exists()


def test_adding_leaves_the_source_alone(library: Library, source: Path) -> None:
    before = tree(source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        library.add(source)
    library.remove("sst2")
    assert tree(source) == before
    assert read_adapter(source).name == "sst2"


def test_a_library_gives_its_adapters_by_name(
    tmp_path: Path, tiny_base_folder: Path, tiny_model: Callable[..., Any], random_adapter: MakeAdapter, generator: Any
) -> None:
    library = Library.create(tmp_path / "lib", tiny_base_folder)
    for name in ("sst2", "sum"):
        adapter = random_adapter(tiny_model(), name, generator, targets=("q_proj", "v_proj"))
        library.add_adapter(adapter, {"tasks": ["films"] if name == "sst2" else []})
    assert repr(library).endswith(", adapters=2, router=arrow)")
    assert (len(library), list(library), "sum" in library, "sst3" in library) == (2, ["sst2", "sum"], True, False)
    expert = library["sst2"]
    assert (expert.name, expert.rank, expert.tasks) == ("sst2", 3, ("films",))
    assert expert.targets == tuple(sorted(library.get("sst2").modules))
    assert expert.num_parameters == library.provenance("sst2")["num_parameters"]
    assert (expert.folder / "adapter_config.json").is_file()
    assert expert.read().modules.keys() == library.get("sst2").modules.keys()
    shown = f"Expert('sst2', rank 3, {expert.num_parameters:,} parameters, layers q_proj v_proj, tasks films)"
    assert repr(expert) == shown
    assert repr(library["sum"]).endswith("layers q_proj v_proj)")
    for wrong in ("sst3", "../sst2", ""):
        with pytest.raises(KeyError, match="must have the adapter that is asked for") as caught:
            library[wrong]
        assert isinstance(caught.value, LibraryError)
    with pytest.raises(KeyError, match=r"\nfound: no adapter 'sst3'\nremedy: did you mean 'sst2'\?"):
        library["sst3"]
