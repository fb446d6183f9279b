import json
import re
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
@pytest.mark.skipif(WITHOUT_ACCELERATOR, reason="this machine has no accelerator that PyTorch can use")
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


@pytest.mark.parametrize("name", ["pooler.weight", "v_head.weight", "model.layers.2.mlp.up_proj.weight"])
def test_a_weight_too_many_is_refused_by_name(name: str, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {name: torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseModelError, match=rf"1 tensors that its configuration has no place for, the first {name}"):
        load_base(folder, device="cpu")


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight"])
def test_what_old_checkpoints_keep_beside_their_weights_is_passed_over(name: str, folder: Path) -> None:
    before = load_base(folder, device="cpu").model.state_dict()
    weights = load_file(folder / "model.safetensors")
    value = weights["model.embed_tokens.weight"].clone() if name == "lm_head.weight" else torch.ones(4)
    save_file(weights | {name: value}, folder / "model.safetensors", {"format": "pt"})
    after = load_base(folder, device="cpu").model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int32, torch.complex64])
def test_weights_that_are_stored_as_no_floats_are_refused_and_never_cast(kind: torch.dtype, folder: Path) -> None:
    weights, name = load_file(folder / "model.safetensors"), "model.layers.1.mlp.down_proj.weight"
    save_file(weights | {name: weights[name].to(kind)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseModelError, match=f"floating-point numbers\nfound: {re.escape(name)} is stored as"):
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


# --- nothing but configuration and named weights


IDS = torch.arange(1, 13).view(2, 6)


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    found: torch.Tensor = load_base(folder, device="cpu").model(input_ids=IDS).logits
    return found


def put_adapter(folder: Path, model: Any, *, merged: bool = False) -> None:
    """Put an adapter of PEFT's beside the weights of a base model."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    wrapped = get_peft_model(model, config)
    wrapped.save_pretrained(folder)
    if merged:
        with quiet_transformers():
            wrapped.merge_and_unload().save_pretrained(folder)


@pytest.mark.parametrize("beside", ["both", "configuration", "garbage", "no object", "weights", "merged"])
def test_an_adapter_beside_the_weights_is_no_part_of_the_base(beside: str, folder: Path, tiny_model: Any) -> None:
    put_adapter(folder, tiny_model(), merged=beside == "merged")
    expected = logits(Path(shutil.copytree(folder, folder.parent / "clean", ignore=shutil.ignore_patterns("adapter*"))))
    if beside in ("configuration", "garbage", "no object"):
        (folder / "adapter_model.safetensors").unlink()
    if beside in ("garbage", "no object"):
        (folder / "adapter_config.json").write_text("{" if beside == "garbage" else "[]")
    if beside == "weights":
        (folder / "adapter_config.json").unlink()
    assert torch.equal(logits(folder), expected)
    base = load_base(folder, device="cpu")
    assert not getattr(base.model, "_hf_peft_config_loaded", False)
    assert base.model.name_or_path == str(folder.resolve())


def test_weights_that_are_missing_are_noticed_beside_an_adapter(folder: Path, tiny_model: Any) -> None:
    put_adapter(folder, tiny_model())
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseModelError, match=r"1 missing keys, the first model\.layers\.1\.mlp\.up_proj"):
        load_base(folder, device="cpu")


def test_the_fingerprint_of_renamed_weights_passes_an_adapter_over(folder: Path, tiny_model: Any) -> None:
    from lorary.library.base_content import content_of_model
    from lorary.library.fingerprint_folder import loaded_model

    put_adapter(folder, tiny_model())
    assert content_of_model(loaded_model(folder)) == content_of_model(tiny_model())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.fp16.safetensors", "custom_generate/generate.py"])
def test_other_files_beside_the_weights_are_not_looked_at(name: str, folder: Path) -> None:
    expected = logits(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("raise SystemExit('it was run')")
    assert torch.equal(logits(folder), expected)


def test_the_single_file_is_taken_before_an_index(folder: Path) -> None:
    expected = logits(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.bin"}}')
    assert torch.equal(logits(folder), expected)


@pytest.mark.parametrize(
    "changes", [{"vocab_size": 10**12}, {"intermediate_size": 10**15}, {"hidden_size": 1 << 40}, {"head_dim": 10**9}]
)
def test_sizes_beyond_the_weights_are_refused_before_memory_is_taken(changes: dict[str, int], folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(BaseModelError, match=r"config\.json"):
        load_base(folder, device="cpu")


@pytest.mark.parametrize("content", ["{", "[]", "\x00", '{"model": 7}'])
def test_a_tokenizer_that_is_garbage_is_refused(content: str, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(BaseModelError, match=r"the tokenizer of the base model .* must load"):
        load_base(folder, device="cpu")


# --- token ids outside the embedding


def add_token(folder: Path, role: str | None, content: str = "[PAD]") -> None:
    """Give the tokenizer of a folder a token for which its model has no embedding."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({role: content} if role else {"additional_special_tokens": [content]})
    tokenizer.save_pretrained(folder)
    vocabulary = len(tokenizer)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": vocabulary - 1}))
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][: vocabulary - 1].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("in_config", [False, True])
def test_a_padding_token_outside_the_embedding_gives_way_to_the_end_token(in_config: bool, folder: Path) -> None:
    add_token(folder, "pad_token")
    if in_config:
        for name in ("config.json", "generation_config.json"):
            document = json.loads((folder / name).read_text())
            padding = json.loads((folder / "config.json").read_text())["vocab_size"]
            (folder / name).write_text(json.dumps(document | {"pad_token_id": padding}))
    base = load_base(folder, device="cpu")
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id == 0
    assert base.model.generation_config.pad_token_id == 0
    batch = base.tokenizer(["Add one", "Which month follows May?"], padding=True, return_tensors="pt")
    assert base.model.generate(**batch, max_new_tokens=8).shape[0] == 2


def test_an_end_token_outside_the_embedding_is_refused(folder: Path) -> None:
    add_token(folder, "eos_token", "</s>")
    with pytest.raises(BaseModelError, match=r"must be in its embedding\nfound: '</s>' has the id"):
        load_base(folder, device="cpu")


def test_a_token_outside_the_embedding_is_refused_where_a_text_holds_it(folder: Path) -> None:
    add_token(folder, None, "<|user|>")
    base = load_base(folder, device="cpu")
    assert torch.isfinite(base.model(**base.tokenizer("Add one", return_tensors="pt")).logits).all()
    with pytest.raises(BaseModelError, match=r"found: the id \d+, '<\|user\|>'"):
        base.model(**base.tokenizer("<|user|>Add one", return_tensors="pt"))


# --- generation as Lorary says it is, whatever the checkpoint likes


@pytest.mark.parametrize(
    "likes",
    [
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 5},
        {"temperature": 0.6},
        {"repetition_penalty": 5.0},
        {"min_length": 40},
        {"num_beams": 3},
        {"suppress_tokens": list(range(1, 200))},
        {"bad_words_ids": [[5], [6]]},
        {"forced_eos_token_id": 7},
        {"max_new_tokens": 1},
        {"stop_strings": ["a"]},
        {"penalty_alpha": 0.5},
        {"no_such_field": 1},
    ],
)
def test_what_a_checkpoint_likes_to_generate_with_is_left_out(likes: dict[str, Any], folder: Path) -> None:
    expected = load_base(folder, device="cpu").model
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 3], **likes}))
    model = load_base(folder, device="cpu").model
    assert model.generation_config.eos_token_id == [0, 3]
    plain = expected.generation_config.to_diff_dict() | {"eos_token_id": [0, 3]}
    assert model.generation_config.to_diff_dict() == plain
    expected.generation_config.eos_token_id = [0, 3]
    assert torch.equal(model.generate(IDS[:1], max_new_tokens=9), expected.generate(IDS[:1], max_new_tokens=9))


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [true]}', '{"eos_token_id": -5}']
)
def test_generation_defaults_that_cannot_be_read_are_refused(content: str, folder: Path) -> None:
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(BaseModelError, match=r"generation_config\.json of the base model"):
        load_base(folder, device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 200}, r"model\.embed_tokens\.weight is stored as \(300, 32\), .* asks for \(200, 32\)"),
        ({"rope_parameters": 7}, r"config\.json\nfound: .*'rope_parameters'"),
        ({"num_attention_heads": 5}, r"config\.json\nfound: "),
        ({"rms_norm_eps": "small"}, r"config\.json\nfound: .*'rms_norm_eps'"),
        ({"hidden_act": "nope"}, r"config\.json\nfound: KeyError: 'nope'"),
        ({"num_hidden_layers": 900}, r"sizes in config\.json .* must be those of its weights"),
        ({"num_hidden_layers": 1}, r"9 tensors that its configuration has no place for"),
        ({"tie_word_embeddings": False}, r"1 missing keys, the first lm_head\.weight"),
    ],
)
def test_a_configuration_that_is_not_of_these_weights_is_refused(
    changes: dict[str, Any], message: str, folder: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(BaseModelError, match=message):
        load_base(folder, device="cpu")


@pytest.mark.parametrize(
    "changes", [{"temperature": 0.6, "num_beams": 3}, {"auto_map": {"AutoModelForCausalLM": "a.B"}}]
)
def test_what_else_a_configuration_may_hold_is_passed_over(changes: dict[str, Any], folder: Path) -> None:
    expected = load_base(folder, device="cpu").model
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "generation_config.json").unlink()
    model = load_base(folder, device="cpu").model
    assert torch.equal(model.generate(IDS[:1], max_new_tokens=5), expected.generate(IDS[:1], max_new_tokens=5))
