"""PEFT's two files: what is read is what is there, what is written is what PEFT reads, the rest is refused by name."""

import json
import math
import os
import pickle
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.adapters import write_adapter
from torch import Tensor

from lorary.adapter import Adapter, LoraFactors, content_hash
from lorary.errors import AdapterError
from lorary.formats.peft import encode_adapter, parse_adapter, read_adapter, tensors_of
from lorary.formats.peft_config import new_config
from lorary.formats.peft_files import Shape, read_shapes

Q_PROJ = "model.layers.0.self_attn.q_proj"
PREFIX = "base_model.model."
KEY_A = f"base_model.model.{Q_PROJ}.lora_A.weight"
KEY_B = f"base_model.model.{Q_PROJ}.lora_B.weight"

# PEFT asks transformers for an attribute that transformers is about to rename.


def pair(rank: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {KEY_A: torch.ones(rank, 32, dtype=dtype), KEY_B: torch.ones(32, rank, dtype=dtype)}


def config(**changes: Any) -> dict[str, Any]:
    return {**new_config("base", rank=2, alpha=4, target_modules=["q_proj"]), **changes}


def write(folder: Path, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def randomise(model: Any, generator: torch.Generator) -> None:
    """Give each factor random values: a fresh LoRA computes nothing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    alpha=st.one_of(st.integers(-4, 64), st.floats(-8, 64, allow_subnormal=False)),
    use_rslora=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25)
def test_reading_then_writing_then_reading_is_the_identity(
    tmp_path_factory: pytest.TempPathFactory,
    ranks: list[int],
    dtype: torch.dtype,
    alpha: float,
    use_rslora: bool,
    seed: int,
) -> None:
    draw = torch.Generator().manual_seed(seed)
    modules = {}
    for layer, rank in enumerate(ranks):
        lora_a = torch.randn(rank, 7, generator=draw).to(dtype)
        lora_b = torch.randn(5, rank, generator=draw).to(dtype)
        modules[f"h.{layer}.mlp"] = LoraFactors(lora_a, lora_b, alpha / (math.sqrt(rank) if use_rslora else rank))
    pattern = {f"h.{layer}.mlp": rank for layer, rank in enumerate(ranks)}
    told = new_config("b", rank=9, alpha=alpha, target_modules=["mlp"], use_rslora=use_rslora, rank_pattern=pattern)
    folder = tmp_path_factory.mktemp("adapter")

    write_adapter(Adapter("a", modules, told), folder / "one")
    first = read_adapter(folder / "one", "a")
    write_adapter(first, folder / "two")
    second = read_adapter(folder / "two", "a")

    assert dict(first.config) == dict(second.config) == told
    assert list(first.tensors) == list(second.tensors)
    for key, tensor in first.tensors.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor.view(torch.uint8), second.tensors[key].view(torch.uint8))
    assert {path: factors.scaling for path, factors in first} == {path: f.scaling for path, f in modules.items()}
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / "one" / file).read_bytes() == (folder / "two" / file).read_bytes()


def test_written_files_load_in_peft_with_equal_logits(
    tmp_path: Path, tiny_model: Callable[..., Any], generator: torch.Generator
) -> None:
    tokens = torch.randint(0, 300, (2, 9), generator=generator)
    settings = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    original = peft.get_peft_model(tiny_model(), settings).eval()
    randomise(original, generator)
    original.save_pretrained(tmp_path / "by_peft")

    write_adapter(read_adapter(tmp_path / "by_peft"), tmp_path / "by_lorary")
    loaded = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "by_lorary").eval()

    with torch.no_grad():
        base, expected, found = tiny_model()(tokens).logits, original(tokens).logits, loaded(tokens).logits
    assert torch.equal(expected, found)
    assert not torch.allclose(expected, base, atol=1e-2)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_scaling_is_that_of_pefts_own_layers(
    tmp_path: Path, tiny_model: Callable[..., Any], generator: torch.Generator, use_rslora: bool
) -> None:
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "down_proj"],
        use_rslora=use_rslora,
        # An exact path, the end of a path, a regular expression.
        rank_pattern={"model.layers.0.self_attn.q_proj": 2, "down_proj": 3},
        alpha_pattern={r"layers\.[1-9]\.self_attn\..*": 5, "k_proj": 6, "model.layers.1.self_attn.k_proj": 99},
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(tiny_model(), settings)
    randomise(model, generator)
    model.save_pretrained(tmp_path)

    adapter = read_adapter(tmp_path)
    # PEFT saves with sorted keys, and the first pattern that matches wins: so compare with the model it loads again.
    again = peft.PeftModel.from_pretrained(tiny_model(), tmp_path)
    layers = {
        path.removeprefix("base_model.model."): module
        for path, module in again.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }

    assert {path: factors.scaling for path, factors in adapter} == {
        path: layer.scaling["default"] for path, layer in layers.items()
    }
    assert {path: factors.rank for path, factors in adapter} == {p: layer.r["default"] for p, layer in layers.items()}
    assert len({factors.scaling for _, factors in adapter}) > 3


def test_the_order_of_patterns_survives_writing(tmp_path: Path) -> None:
    # "q_proj" sorts after "b.*", but stands first and therefore wins.
    told = config(alpha_pattern={"q_proj": 6, "[a-z.0-9_]*q_proj": 9})
    write_adapter(read_adapter(write(tmp_path / "a", told, pair())), tmp_path / "b")
    assert read_adapter(tmp_path / "b").modules[Q_PROJ].scaling == 3.0


def test_the_name_of_an_adapter_defaults_to_its_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "sst2", config(), pair())
    assert read_adapter(folder).name == "sst2"
    assert read_adapter(folder, "other").name == "other"


def test_equal_adapters_give_equal_bytes_whatever_the_order_of_their_layers(tmp_path: Path) -> None:
    factors = LoraFactors(torch.ones(2, 4), torch.ones(3, 2), 2.0)
    for name, paths in {"one": ["a.x", "b.x"], "two": ["b.x", "a.x"]}.items():
        told = new_config("b", rank=2, alpha=4, target_modules=paths)
        write_adapter(Adapter("a", dict.fromkeys(paths, factors), told), tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_disk_tensors_do_not_keep_a_stack_of_experts_alive() -> None:
    stack_a, stack_b = torch.ones(100, 2, 4), torch.ones(100, 3, 2)
    tensors = tensors_of({"x": LoraFactors(stack_a[3], stack_b[3], 1.0)})
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors.values())


def test_factors_changed_after_reading_are_not_written_as_they_were_read(tmp_path: Path) -> None:
    adapter = read_adapter(write(tmp_path / "a", config(), pair()))
    modules = {Q_PROJ: LoraFactors(torch.zeros(2, 32), torch.ones(32, 2), 2.0)}
    with pytest.raises(AdapterError, match="factors and the scaling that its files would give"):
        write_adapter(Adapter("a", modules, adapter.config, adapter.tensors), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_configuration_of_another_scaling_is_not_written(tmp_path: Path) -> None:
    adapter = Adapter("a", {Q_PROJ: LoraFactors(torch.ones(2, 32), torch.ones(32, 2), 1.0)}, config())
    with pytest.raises(AdapterError, match=r"scaling 1\.0 in memory, 2\.0 by its files"):
        write_adapter(adapter, tmp_path / "b")


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_refused_by_name(tmp_path: Path, file: str) -> None:
    folder = write(tmp_path / "a", config(), pair())
    (folder / file).unlink()
    with pytest.raises(AdapterError, match=rf"(?s)adapter 'a' must be a folder with.*{file}: No such file"):
        read_adapter(folder)


def test_a_pickle_is_refused_and_never_opened(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", config(), pair())
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))
    (folder / "adapter_model.bin").chmod(0)
    with pytest.raises(AdapterError, match="a pickle can run code"):
        read_adapter(folder)


@pytest.mark.parametrize("text", ['{"r": 4,\n "lora_alpha": }', "[1]", '{"r": NaN}', "", "[" * 100_000])
def test_bad_json_is_refused_by_name(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path / "a", config(), pair())
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match=r"adapter 'a': adapter_config\.json must be one JSON object"):
        read_adapter(folder)


def test_bad_json_is_reported_with_its_line(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", config(), pair())
    (folder / "adapter_config.json").write_text('{"r": 4,\n "lora_alpha": }')
    with pytest.raises(AdapterError, match="line 2 column"):
        read_adapter(folder)


@given(kept=st.floats(0, 1, exclude_max=True))
@settings(max_examples=25)
def test_a_truncated_file_is_refused_by_name(kept: float) -> None:
    whole = safetensors.torch.save(pair())
    files = {"adapter_config.json": json.dumps(config()).encode()}
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors must be a whole safetensors file"):
        parse_adapter("a", {**files, "adapter_model.safetensors": whole[: int(kept * len(whole))]})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    tensors = pair(dtype=torch.bfloat16)
    tensors[KEY_B][3, 1] = value
    with pytest.raises(AdapterError, match=rf"(?s)adapter 'a' must have finite weights.*{KEY_B}"):
        read_adapter(write(tmp_path / "a", config(), tensors))


def embedding(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.ones(2, 8)


def magnitude(tensors: dict[str, Tensor]) -> None:
    tensors[f"base_model.model.{Q_PROJ}.lora_magnitude_vector.sst2"] = torch.ones(32)


def bias(tensors: dict[str, Tensor]) -> None:
    tensors[f"base_model.model.{Q_PROJ}.lora_A.bias"] = torch.ones(32)


def base_bias(tensors: dict[str, Tensor]) -> None:
    tensors[f"base_model.model.{Q_PROJ}.base_layer.bias"] = torch.ones(32)


def saved_module(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.lm_head.weight"] = torch.ones(8, 8)


def half_a_pair(tensors: dict[str, Tensor]) -> None:
    del tensors[KEY_A]


def no_prefix(tensors: dict[str, Tensor]) -> None:
    tensors[KEY_A.removeprefix("base_model.model.")] = tensors.pop(KEY_A)


def named_adapter(tensors: dict[str, Tensor]) -> None:
    tensors[KEY_A.replace(".weight", ".sst2.weight")] = tensors.pop(KEY_A)


@pytest.mark.parametrize(
    "spoil", [embedding, magnitude, bias, base_bias, saved_module, half_a_pair, no_prefix, named_adapter]
)
def test_a_tensor_that_is_not_half_of_a_pair_is_refused_by_name(
    tmp_path: Path, spoil: Callable[[dict[str, Tensor]], None]
) -> None:
    tensors = pair()
    spoil(tensors)
    strays = sorted(set(tensors) - {KEY_A, KEY_B}) or [KEY_B]
    with pytest.raises(AdapterError, match="must hold nothing but pairs") as caught:
        read_adapter(write(tmp_path / "a", config(), tensors))
    assert any(key in str(caught.value) for key in [*strays, KEY_B])


FURTHER = pytest.mark.parametrize(
    ("field", "part", "keys"),
    [
        ("lora_bias", "bias", ("lora_B.bias", "lora_B.default.bias")),
        (
            "use_dora",
            "magnitude",
            ("lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight"),
        ),
    ],
)


@FURTHER
def test_a_bias_and_a_magnitude_are_read_under_each_key_that_peft_loads(
    tmp_path: Path, field: str, part: str, keys: Sequence[str]
) -> None:
    for number, key in enumerate(keys):
        tensors = {**pair(), f"{PREFIX}{Q_PROJ}.{key}": torch.arange(32.0)}
        folder = write(tmp_path / str(number), config(**{field: True}), tensors)
        adapter = read_adapter(folder)
        factors = adapter.modules[Q_PROJ]
        assert torch.equal(getattr(factors, part), torch.arange(32.0))
        assert sum(tensor is not None for tensor in (factors.bias, factors.magnitude)) == 1
        assert adapter.num_parameters == 2 * 2 * 32 + 32
        files = encode_adapter(adapter)
        assert torch.equal(getattr(parse_adapter("a", files).modules[Q_PROJ], part), torch.arange(32.0))
        with pytest.raises(AdapterError, match=rf"if, and only if, {field} is true"):
            read_adapter(write(tmp_path / str(number), config(), tensors))
        with pytest.raises(AdapterError, match=rf"if, and only if, {field} is true"):
            read_adapter(write(tmp_path / str(number), config(**{field: True}), pair()))


@FURTHER
@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        (torch.ones(31), r"a (bias|magnitude) of shape \(32,\), of floats"),
        (torch.ones(1, 32), r"a (bias|magnitude) of shape \(32,\), of floats"),
        (torch.ones(32, dtype=torch.int8), r"a (bias|magnitude) of shape \(32,\), of floats"),
        (torch.full((32,), math.nan), "must have finite weights"),
    ],
)
def test_a_bias_or_magnitude_that_cannot_be_one_is_refused_by_name(
    tmp_path: Path, field: str, part: str, keys: Sequence[str], spoiled: Tensor, message: str
) -> None:
    tensors = {**pair(), f"{PREFIX}{Q_PROJ}.{keys[0]}": spoiled}
    with pytest.raises(AdapterError, match=message):
        read_adapter(write(tmp_path / "a", config(**{field: True}), tensors))


@FURTHER
def test_a_change_of_a_bias_or_magnitude_alone_is_another_adapter(field: str, part: str, keys: Sequence[str]) -> None:
    tensors = {**pair(), f"{PREFIX}{Q_PROJ}.{keys[0]}": torch.ones(32)}
    other = {**tensors, f"{PREFIX}{Q_PROJ}.{keys[0]}": torch.cat([torch.ones(31), torch.zeros(1)])}
    hashes = {content_hash(config(**{field: True}), t) for t in (tensors, other)}
    assert len({*hashes, content_hash(config(), pair())}) == 3


def test_a_factor_that_is_given_under_two_keys_is_refused(tmp_path: Path) -> None:
    tensors = {**pair(), KEY_A.replace(".weight", ".default.weight"): torch.ones(2, 32)}
    with pytest.raises(AdapterError, match=rf"{KEY_A} .*: the second of its kind for the layer"):
        read_adapter(write(tmp_path / "a", config(), tensors))


def test_a_key_that_is_longer_than_any_path_is_refused_at_once(tmp_path: Path) -> None:
    key = f"base_model.model.{'.' * 200_000}.lora_A.weight"
    with pytest.raises(AdapterError, match="longer than 1000 characters") as caught:
        read_adapter(write(tmp_path / "a", config(), {**pair(), key: torch.ones(2, 32)}))
    assert len(str(caught.value)) < 1000


def test_factors_of_a_convolution_are_refused_by_name(tmp_path: Path) -> None:
    tensors = {KEY_A: torch.ones(2, 3, 3, 3), KEY_B: torch.ones(4, 2, 1, 1)}
    with pytest.raises(AdapterError, match=rf"must have at {Q_PROJ} two matrices"):
        read_adapter(write(tmp_path / "a", config(), tensors))


def test_a_pair_of_two_dtypes_is_refused_by_name(tmp_path: Path) -> None:
    tensors = {**pair(), KEY_A: torch.ones(2, 32, dtype=torch.float16)}
    with pytest.raises(AdapterError, match=rf"both factors at {Q_PROJ} in one dtype"):
        read_adapter(write(tmp_path / "a", config(), tensors))


def test_integer_factors_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=rf"both factors at {Q_PROJ} in one dtype of 16, 32 or 64-bit floats"):
        read_adapter(write(tmp_path / "a", config(), pair(dtype=torch.int8)))


def test_rank_zero_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="rank at least 1"):
        read_adapter(write(tmp_path / "a", config(r=0), pair(rank=0)))


def test_factors_whose_ranks_disagree_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"two matrices .* {Q_PROJ}|{Q_PROJ} two matrices"):
        read_adapter(write(tmp_path / "a", config(), {**pair(), KEY_B: torch.ones(32, 3)}))


def test_a_rank_that_the_configuration_does_not_state_is_refused_with_the_layer(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=rf"(?s)have at {Q_PROJ} the rank .* states \(2\).*rank 3"):
        read_adapter(write(tmp_path / "a", config(), pair(rank=3)))


def test_an_adapter_without_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="must hold LoRA factors"):
        read_adapter(write(tmp_path / "a", config(), {}))


def test_weights_for_a_layer_that_peft_would_ignore_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=rf"weights for {Q_PROJ}, a layer that its adapter_config.json does not"):
        read_adapter(write(tmp_path / "a", config(target_modules=["v_proj"]), pair()))


RENAMED: dict[str, tuple[Callable[[str], str], str | None]] = {
    "as they are": (lambda key: key, None),
    "the default name of an adapter": (lambda key: key.replace(".weight", ".default.weight"), None),
    "another name of an adapter": (lambda key: key.replace(".weight", ".sst2.weight"), "hold the name of the adapter"),
    "torch.compile": (lambda key: f"_orig_mod.{key}", "torch.compile"),
    "torch.compile inside": (lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."), "torch.compile"),
    "torch.compile of a layer": (lambda key: key.replace("layers.0.", "layers.0._orig_mod."), "torch.compile"),
    "DataParallel": (lambda key: f"module.{key}", "DataParallel"),
    "DataParallel inside": (lambda key: key.replace(PREFIX, f"{PREFIX}module."), "DataParallel"),
    "FSDP": (lambda key: f"_fsdp_wrapped_module.{key}", "FSDP"),
    "FSDP of a layer": (lambda key: key.replace("layers.0.", "layers.0._fsdp_wrapped_module."), "FSDP"),
    "no prefix": (lambda key: key.removeprefix(PREFIX), "lack PEFT's prefix"),
    "the prefix twice": (lambda key: PREFIX + key, "PEFT's prefix twice"),
    "mlx": (lambda key: key.removeprefix(PREFIX).replace("_A.weight", "_a").replace("_B.weight", "_b"), "mlx"),
    "kohya": (lambda key: "lora_unet_q.lora_down.weight" if "lora_A" in key else "lora_unet_q.lora_up.weight", "kohya"),
    "LyCORIS": (lambda key: f"q.hada_w1_{'a' if 'lora_A' in key else 'b'}", "LyCORIS"),
    "a whole model": (lambda key: f"model.layers.{int('lora_A' in key)}.q_proj.weight", "a whole model"),
}


@pytest.mark.parametrize("which", RENAMED)
def test_what_peft_loads_is_loaded_and_what_it_ignores_is_named_for_what_it_is(
    tmp_path: Path, tiny_model: Callable[..., Any], generator: torch.Generator, which: str
) -> None:
    rename, reason = RENAMED[which]
    plain = {KEY_A: torch.randn(2, 32, generator=generator), KEY_B: torch.randn(32, 2, generator=generator)}
    folder = write(tmp_path / "a", config(), {rename(key): tensor for key, tensor in plain.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(tiny_model(), str(folder))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    is_loaded = torch.equal(layer.lora_B["default"].weight, plain[KEY_B])
    assert is_loaded == (reason is None)
    if reason is None:
        adapter = read_adapter(folder)
        assert torch.equal(adapter.modules[Q_PROJ].lora_b, plain[KEY_B])
        assert read_shapes(folder, "a") == {Q_PROJ: Shape(2, 32, 32)}
        write_adapter(adapter, tmp_path / "b")
        assert set(read_adapter(tmp_path / "b").tensors) == set(adapter.tensors)
    else:
        with pytest.raises(AdapterError, match=reason):
            read_adapter(folder)


@pytest.mark.parametrize("shape", [(0,), (0, 32), (8,)])
def test_weights_that_zero_3_left_in_pieces_are_named(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(AdapterError, match="ZeRO-3"):
        read_adapter(write(tmp_path / "a", config(), {KEY_A: torch.ones(shape), KEY_B: torch.ones(shape)}))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (LFS, "Git LFS pointer"),
        (b"<!DOCTYPE html><html>Not found</html>", "HTML"),
        (b"\n <html>", "HTML"),
        (b"Entry not found", "text, beginning with 'Entry not found'"),
        (b'{"error": "no access"}', "text, beginning with"),
        (pickle.dumps({}), "a pickle"),
        (b"PK\x03\x04" + bytes(30), "a pickle"),
        (b"GGUF" + bytes(30), "GGUF"),
        (b"", "an empty file"),
        (safetensors.torch.save(pair())[:60], "ends in its header"),
    ],
)
def test_a_file_of_another_kind_is_named_for_what_it_is(tmp_path: Path, data: bytes, reason: str) -> None:
    folder = write(tmp_path / "a", config(), pair())
    (folder / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(AdapterError, match=rf"(?s)adapter_model\.safetensors must be a whole.*found: .*{reason}"):
        read_adapter(folder)


@pytest.mark.parametrize(("data", "reason"), [(LFS, "Git LFS pointer"), (b"<html>", "HTML"), (b"", "an empty file")])
def test_a_configuration_of_another_kind_is_named_for_what_it_is(tmp_path: Path, data: bytes, reason: str) -> None:
    folder = write(tmp_path / "a", config(), pair())
    (folder / "adapter_config.json").write_bytes(data)
    with pytest.raises(AdapterError, match=rf"(?s)adapter_config\.json must be one JSON object\nfound: .*{reason}"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": {"rank": 8}}, "mlx"),
        ({"config": {"architecture": "lora"}, "model_class": "LlamaForCausalLM"}, "AdapterHub"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "configuration of a whole model"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"),
    ],
)
def test_a_configuration_of_another_library_is_named(tmp_path: Path, told: dict[str, Any], reason: str) -> None:
    with pytest.raises(AdapterError, match=rf"must be a LoRA(?s:.*){reason}"):
        read_adapter(write(tmp_path / "a", told, pair()))


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("adapters.safetensors", "mlx"),
        ("pytorch_lora_weights.safetensors", "diffusers"),
        ("pytorch_adapter.bin", "AdapterHub"),
        ("adapter_model-00001-of-00003.safetensors", "in several files"),
        ("model.safetensors", "a whole model"),
    ],
)
def test_a_folder_of_another_layout_is_named_for_what_it_is(tmp_path: Path, file: str, reason: str) -> None:
    folder = write(tmp_path / "a", config(), pair())
    (folder / "adapter_model.safetensors").rename(folder / file)
    with pytest.raises(AdapterError, match=rf"the folder holds .*{reason}"):
        read_adapter(folder)


def test_an_adapter_in_the_folder_of_its_name_is_pointed_to(tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(tiny_model(), settings, adapter_name="sst2").save_pretrained(str(tmp_path / "out"))
    with pytest.raises(AdapterError, match=rf"remedy: give one of these folders: .*{tmp_path / 'out' / 'sst2'}"):
        read_adapter(tmp_path / "out")
    assert read_adapter(tmp_path / "out" / "sst2").rank == 2


def header(text: str, size: int | None = None, data: bytes = b"") -> bytes:
    return (len(text) if size is None else size).to_bytes(8, "little") + text.encode() + data


@pytest.mark.parametrize(
    "data",
    [
        header("{}", 2**63),
        header("{}", 10**8 + 1),
        header("{}", 10**7),
        header("{"),
        header("[" * 100_000),
        header(
            '{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}',
            data=bytes(24),
        ),
        header('{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,160]}}', data=bytes(16)),
        header('{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}', data=bytes(16)),
        header(
            '{"a":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,16]}}', data=bytes(16)
        ),
        header('{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}', data=bytes(16)),
        header('{"a":{"dtype":"X9","shape":[4],"data_offsets":[0,16]}}', data=bytes(16)),
        header(
            '{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
            data=bytes(16),
        ),
        header(
            '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
            data=bytes(16),
        ),
    ],
)
def test_a_header_that_lies_is_refused_by_name(data: bytes) -> None:
    files = {"adapter_config.json": json.dumps(config()).encode(), "adapter_model.safetensors": data}
    with pytest.raises(AdapterError, match="must be a whole safetensors file"):
        parse_adapter("a", files)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_refused_at_once(tmp_path: Path, file: str) -> None:
    folder = write(tmp_path / "a", config(), pair())
    (folder / file).unlink()
    os.mkfifo(folder / file)
    with pytest.raises(AdapterError, match="not a regular file"):
        read_adapter(folder)
    if file.endswith(".safetensors"):
        with pytest.raises(AdapterError, match="not a regular file"):
            read_shapes(folder, "a")


def test_a_folder_whose_name_is_too_long_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="File name too long"):
        read_adapter(tmp_path / ("a" * 300))


@pytest.mark.parametrize(
    "text",
    ['{"r": 1e999}', '{"lora_alpha": -Infinity}', '{"r": ' + "9" * 5000 + "}", '{"a": "\\ud800"}', '{"r": 1, "r": 2}'],
)
def test_a_configuration_that_is_no_plain_json_is_refused_by_name(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path / "a", config(), pair())
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match=r"adapter 'a': adapter_config\.json must be one JSON object"):
        read_adapter(folder)
