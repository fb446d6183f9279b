"""A routed model survives the disk, bit for bit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from lorary.adapter import Adapter
from lorary.errors import LibraryError, LoraryError, UsageError
from lorary.formats.quiet import quiet_transformers
from lorary.library.store import Library
from lorary.model.apply import apply_routing
from lorary.model.attach import attach
from lorary.model.live import add_expert, remove_expert, replace_expert
from lorary.model.prepare import prepare
from lorary.model.save import load, save
from lorary.model.seating import seating
from lorary.route.setting import Routing

Make = Callable[..., Any]
IDS = torch.arange(1, 13).view(2, 6)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.fixture
def adapters(tiny_model: Make, random_adapter: Make, generator: torch.Generator) -> list[Adapter]:
    return [random_adapter(tiny_model(), name, generator, rank=1 + i) for i, name in enumerate("abcd")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_saving_and_loading_a_live_base_changes_no_bit(
    tiny_model: Make, adapters: list[Adapter], route: Make, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = route(tiny_model(dtype=dtype), adapters, router="lag", top_k=2, temperature=0.5, candidates=3)
    assert save(model, tmp_path / "saved") == tmp_path / "saved"
    again = load(tmp_path / "saved", device="cpu")
    assert torch.equal(logits(again), logits(model))
    assert again.dtype == dtype
    assert seating(again).routing == seating(model).routing
    suffixes = {path.suffix for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors", ".lock"}


def test_a_model_that_changed_live_is_loaded_with_the_same_bits(
    tiny_model: Make, adapters: list[Adapter], route: Make, random_adapter: Make, generator: torch.Generator,
    tmp_path: Path,
) -> None:  # fmt: skip
    model = route(tiny_model(), adapters[1:], top_k=3)
    add_expert(model, adapters[0])
    remove_expert(model, "c")
    replace_expert(model, random_adapter(tiny_model(), "b", generator, rank=2))
    assert seating(model).seats == ("b", "d", "a")
    again = load(save(model, tmp_path / "saved"), device="cpu")
    assert torch.equal(logits(again), logits(model))
    assert seating(again).experts == ("a", "b", "d")
    # And once more, from the copy.
    assert torch.equal(logits(load(save(again, tmp_path / "twice"), device="cpu")), logits(model))


def test_a_base_with_files_of_its_own_is_only_referred_to(
    tiny_base_folder: Path, adapters: list[Adapter], tmp_path: Path
) -> None:
    from lorary.model.base import load_base

    library = Library.create(tmp_path / "lib", tiny_base_folder)
    for adapter in adapters:
        library.add_adapter(adapter, {"tasks": [adapter.name]})
    model = attach(load_base(tiny_base_folder, device="cpu").model, library, top_k=2)
    save(model, tmp_path / "saved")
    assert not (tmp_path / "saved/base").exists()
    assert json.loads((tmp_path / "saved/model.json").read_text())["base"]["reference"] == str(tiny_base_folder)
    assert torch.equal(logits(load(tmp_path / "saved", device="cpu")), logits(model))
    assert Library.open(tmp_path / "saved/library").describe() == library.describe()
    save(model, tmp_path / "whole", copy_base=True)
    assert (tmp_path / "whole/base/model.safetensors").is_file()
    assert torch.equal(logits(load(tmp_path / "whole", device="cpu")), logits(model))


def test_what_was_prepared_is_saved_too(
    tiny_model: Make, adapters: list[Adapter], route: Make, tmp_path: Path, generator: torch.Generator
) -> None:
    model = route(tiny_model(), adapters, top_k=2)
    statistics = {a.name: {path: torch.rand(2, generator=generator) + 0.5 for path in a.modules} for a in adapters}
    prepare(model, "norm_calibration", statistics)
    apply_routing(model, seating(model), Routing.of("norm", calibrated=True, allow=["a", "c", "d"]))
    again = load(save(model, tmp_path / "saved"), device="cpu")
    assert torch.equal(logits(again), logits(model))


def test_an_adapter_that_changed_on_disk_is_not_saved_as_the_seated_one(
    tiny_model: Make, adapters: list[Adapter], route: Make, tmp_path: Path
) -> None:
    model = route(tiny_model(), adapters[:2])
    library = seating(model).library
    library.replace_adapter(Adapter("a", adapters[2].modules, adapters[2].config), {"tasks": []})
    with pytest.raises(LibraryError, match=r"adapter 'a' of library .* must be what is seated"):
        save(model, tmp_path / "saved")
    library.remove("a")
    with pytest.raises(LibraryError, match="no adapter 'a'"):
        save(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_saving_that_fails_half_way_leaves_nothing(
    tiny_model: Make, adapters: list[Adapter], route: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = route(tiny_model(), adapters[:2])

    def fail(*_args: Any, **_settings: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", fail)
    (tmp_path / "empty").mkdir()
    for folder in ("saved", "empty"):
        with pytest.raises(LibraryError, match="free some space"):
            save(model, tmp_path / folder)
    assert not (tmp_path / "saved").exists()
    assert list((tmp_path / "empty").iterdir()) == []


def test_what_cannot_be_saved_or_loaded_is_refused(
    tiny_model: Make, adapters: list[Adapter], route: Make, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="must be a routed one"):
        save(tiny_model(), tmp_path / "saved")
    model = route(tiny_model(), adapters[:2])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    with pytest.raises(UsageError, match="a folder of its own"):
        save(model, tmp_path / "taken")
    with pytest.raises(UsageError, match="must have files to be referred to"):
        save(model, tmp_path / "saved", copy_base=False)
    with pytest.raises(UsageError, match=r"must be a saved routed model\nfound: no model.json"):
        load(tmp_path / "taken")
    saved = save(model, tmp_path / "saved")
    document = json.loads((saved / "model.json").read_text())
    for change, message in (
        ({"format_version": 2}, "must have format version 1"),
        ({"seats": None}, "must say base, seats and routing"),
        ({"seats": ["../x"]}, "must say base, seats and routing"),
        ({"routing": {"router": "no such"}}, "must say base, seats and routing"),
        ({"routing": {"rooter": "arrow"}}, "must say base, seats and routing"),
    ):
        (saved / "model.json").write_text(json.dumps({**document, **change}))
        with pytest.raises(LibraryError, match=message):
            load(saved)
    (saved / "model.json").write_text(json.dumps(document))
    buffers = safetensors.torch.load_file(saved / "buffers.safetensors")
    assert buffers
    for change in ({"no.such": torch.ones(1)}, {name: torch.ones(3) for name in buffers}):
        safetensors.torch.save_file({**buffers, **change}, saved / "buffers.safetensors")
        with pytest.raises(LibraryError, match=r"buffers\.safetensors must hold buffers of the base model"):
            load(saved, device="cpu")
    (saved / "buffers.safetensors").write_bytes(b"{}")
    with pytest.raises(LibraryError, match=r"buffers\.safetensors must be whole"):
        load(saved, device="cpu")
    safetensors.torch.save_file(buffers, saved / "buffers.safetensors")
    for name, value in (("contrast", 1.0), ("contrast/a/layer", float("nan"))):
        safetensors.torch.save_file({name: torch.tensor([value])}, saved / "prepared.safetensors")
        with pytest.raises(LibraryError, match="must hold finite tensors by kind, expert and layer"):
            load(saved, device="cpu")
    (saved / "prepared.safetensors").unlink()
    (saved / "base/model.safetensors").write_bytes(b"")
    with pytest.raises(LoraryError), quiet_transformers():
        load(saved, device="cpu")


@pytest.fixture
def stored(tiny_base_folder: Path, adapters: list[Adapter], tmp_path: Path) -> Library:
    """A library over the tiny base in its folder."""
    library = Library.create(tmp_path / "lib", tiny_base_folder)
    for adapter in adapters:
        library.add_adapter(adapter, {"tasks": [adapter.name]})
    return library


@pytest.mark.parametrize(
    "changes",
    [{"rms_norm_eps": 0.1}, {"hidden_act": "gelu"}, {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}],
)
def test_the_same_weights_under_another_configuration_are_saved_as_they_are(
    changes: dict[str, Any], tiny_base_folder: Path, stored: Library, tmp_path: Path
) -> None:
    from lorary.model.base import load_base

    folder = Path(shutil.copytree(tiny_base_folder, tmp_path / "other"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    plain = logits(load_base(tiny_base_folder, device="cpu").model)
    model = load_base(folder, device="cpu").model
    with pytest.warns(UserWarning, match=rf"other values \({next(iter(changes))}"):
        attach(model, stored, top_k=2)
    save(model, tmp_path / "saved")
    (tmp_path / "live").mkdir()
    model.name_or_path = ""
    save(model, tmp_path / "live")
    for name in ("saved", "live"):
        with pytest.warns(UserWarning, match="its configuration has other values"):
            again = load(tmp_path / name, device="cpu")
        assert torch.equal(logits(again), logits(model))
        assert not torch.equal(logits(again), plain)
    # Whoever changes the configuration of the base that a saved model refers to is told.
    reference = json.loads((tmp_path / "saved/model.json").read_text())["base"]["reference"]
    assert reference == str(folder.resolve())


@pytest.mark.parametrize(
    "likes", [{"temperature": 0.6}, {"top_p": 0.5, "top_k": 3}, {"num_beams": 1, "early_stopping": True}]
)
def test_a_base_with_generation_defaults_of_its_own_is_saved(
    likes: dict[str, Any], tiny_base_folder: Path, stored: Library, tmp_path: Path
) -> None:
    from transformers import GenerationConfig

    from lorary.model.base import load_base

    folder = Path(shutil.copytree(tiny_base_folder, tmp_path / "other"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, **likes}))
    model = attach(load_base(folder, device="cpu").model, stored, top_k=2)
    again = load(save(model, tmp_path / "saved", copy_base=True), device="cpu")
    assert torch.equal(logits(again), logits(model))
    # A live model keeps the defaults that its owner gave it, and is saved without them.
    model.generation_config = own = GenerationConfig(eos_token_id=[0, 4], **likes)
    again = load(save(model, tmp_path / "live", copy_base=True), device="cpu")
    assert model.generation_config is own
    assert again.generation_config.to_diff_dict().get("eos_token_id") == [0, 4]
    assert not likes.keys() & again.generation_config.to_diff_dict().keys()
