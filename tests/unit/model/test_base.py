import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorary
from lorary.errors import BaseModelError, UsageError
from lorary.formats.base import resolve_base
from lorary.formats.quiet import quiet_transformers
from lorary.model.base import choose_device, choose_dtype, load_base

WITHOUT_ACCELERATOR = not (torch.cuda.is_available() or torch.backends.mps.is_available())


@pytest.fixture
def folder(tmp_path: Path, tiny_base_folder: Path) -> Path:
    """A good base model that the test may change."""
    return Path(shutil.copytree(tiny_base_folder, tmp_path / "model"))


def store_as(folder: Path, dtype: torch.dtype) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor.to(dtype) for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))


def test_a_loaded_base_is_frozen_and_in_eval_mode(tiny_base_folder: Path) -> None:
    base = load_base(tiny_base_folder, device="cpu")
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.model.config._attn_implementation == "sdpa"
    assert base.files == resolve_base(tiny_base_folder)


def test_loading_gives_back_the_weights_that_were_saved(tiny_base_folder: Path, tiny_model: Any) -> None:
    saved, loaded = tiny_model().state_dict(), load_base(tiny_base_folder, device="cpu").model.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_files_that_were_found_before_are_not_looked_for_again(
    tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = resolve_base(tiny_base_folder)
    monkeypatch.setattr("lorary.model.base.resolve_base", lambda reference: pytest.fail("looked again"))
    assert load_base(files, device="cpu").files is files


def test_loading_says_nothing(tiny_base_folder: Path) -> None:
    code = f"import lorary; lorary.load_base({str(tiny_base_folder)!r}, device='cpu')"
    source = str(Path(lorary.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env={"PYTHONPATH": source}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_on_the_cpu_the_dtype_is_float32_however_it_is_stored(stored: torch.dtype, folder: Path) -> None:
    store_as(folder, stored)
    assert load_base(folder, device="cpu").model.dtype == torch.float32


@pytest.mark.parametrize("word", ["bfloat16", "float64"])
def test_a_dtype_that_is_asked_for_is_given(word: str, tiny_base_folder: Path) -> None:
    assert load_base(tiny_base_folder, dtype=word, device="cpu").model.dtype == getattr(torch, word)


def test_on_an_accelerator_the_dtype_is_as_stored() -> None:
    assert choose_dtype("auto", torch.device("cuda")) is None
    assert choose_dtype("auto", torch.device("mps")) is None
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32


@pytest.mark.gpu
def test_a_bfloat16_base_stays_so_on_the_accelerator(folder: Path) -> None:
    store_as(folder, torch.bfloat16)
    model = load_base(folder).model
    assert model.dtype == torch.bfloat16
    assert model.device.type != "cpu"


@pytest.mark.skipif(not WITHOUT_ACCELERATOR, reason="this machine has an accelerator")
def test_without_an_accelerator_the_device_is_the_cpu() -> None:
    assert choose_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda:99", "gpu", ""])
def test_a_device_that_is_not_here_is_a_usage_error(device: str) -> None:
    with pytest.raises(UsageError, match="the device must exist on this machine"):
        choose_device(device)


def test_an_unknown_dtype_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"must be one of auto, float64, float32.*\nfound: int4"):
        choose_dtype("int4", torch.device("cpu"))


def test_the_padding_token_falls_back_to_the_end_token(tiny_base_folder: Path) -> None:
    base = load_base(tiny_base_folder, device="cpu")
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id == 0
    assert base.tokenizer.padding_side == "left"


def test_a_padding_token_of_its_own_is_kept(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "!"}))
    tokenizer = load_base(folder, device="cpu").tokenizer
    assert tokenizer.pad_token == "!"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_padded_batch_generates_without_a_warning(tiny_base_folder: Path) -> None:
    base = load_base(tiny_base_folder, device="cpu")
    rows = ["Add one", "Which month follows May?"]
    batch = base.tokenizer(rows, padding=True, return_tensors="pt")
    together = base.model.generate(**batch, max_new_tokens=4, do_sample=False)
    alone = base.model.generate(**base.tokenizer(rows[:1], return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert together[0, -alone.shape[1] :].tolist() == alone[0].tolist()


def test_a_tokenizer_without_an_end_token_is_refused(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="must have an end-of-sequence token"):
        load_base(folder, device="cpu")


def test_a_missing_weight_is_refused_and_never_filled_at_random(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        BaseModelError, match=r"found: 1 missing keys, the first model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        load_base(folder, device="cpu")


def test_a_weight_of_another_shape_is_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseModelError, match=r"model\.norm\.weight|must load from"):
        load_base(folder, device="cpu")


def test_a_weight_too_many_is_named_in_a_warning(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"pooler.weight": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=r"1 tensors that its architecture does not use, the first pooler\.weight"):
        load_base(folder, device="cpu")


def test_cut_off_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BaseModelError, match=r"the weights of the base model .* must load"):
        load_base(folder, device="cpu")


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(BaseModelError, match=r"the tokenizer of the base model .* must load"):
        load_base(folder, device="cpu")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("bars", [False, True])
def test_silence_ends_with_the_block_also_after_an_error(bars: bool, fails: bool) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    logging.set_verbosity_info()
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
    try:
        with quiet_transformers():
            assert not logging.is_progress_bar_enabled()
            assert are_progress_bars_disabled()
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    after = (logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled())
    logging.set_verbosity_warning()
    logging.enable_progress_bar()
    assert after == (logging.INFO, bars, not bars)
