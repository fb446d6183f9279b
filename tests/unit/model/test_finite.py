"""Layers that give no numbers are refused by name, even where attention turns them into numbers again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorary.adapter import Adapter, LoraFactors
from lorary.errors import AdapterError, BaseModelError, UsageError
from lorary.formats.peft_patterns import new_adapter
from lorary.library.store import Library
from lorary.model.attach import attach
from lorary.model.finite import finite_layers
from lorary.model.live import add_expert

Make = Callable[..., Any]
LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")


def spoilt(model: Any, path: str, value: float) -> Any:
    with torch.no_grad():
        model.get_submodule(path).weight[0, 0] = value
    return model


@torch.no_grad()
def run(model: Any, **more: Any) -> None:
    with finite_layers(model):
        model(input_ids=torch.arange(1, 6)[None], **more)
        model(input_ids=torch.arange(2, 9)[None], **more)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_layer_that_gives_no_numbers_is_named_with_its_cause(
    tiny_model: Make, layer: str, value: float
) -> None:
    path = f"model.layers.1.{layer}"
    with pytest.raises(BaseModelError, match=f"layer '{path}' must give finite numbers") as error:
        run(spoilt(tiny_model(), path, value))
    assert f"in the weights, in {path}.weight" in str(error.value)


VAST = (
    "model.embed_tokens", "model.layers.0.input_layernorm", "model.layers.0.self_attn.v_proj",
    "model.layers.1.post_attention_layernorm", "model.layers.1.mlp.down_proj",
)  # fmt: skip


@pytest.mark.parametrize("layer", VAST)
def test_a_vast_weight_that_the_next_norm_turns_into_zeros_is_refused_and_named(tiny_model: Make, layer: str) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_submodule(layer).weight[..., 0] = 1e30
    with pytest.raises(BaseModelError, match=r"must give numbers below 1e\+16") as error:
        run(model)
    assert f"1e+30 in the weights, in {layer}.weight" in str(error.value)


def test_an_error_of_ours_that_such_layers_led_to_gives_way_to_where_they_began(tiny_model: Make) -> None:
    model = spoilt(tiny_model(), "model.layers.1.mlp.down_proj", 1e30)

    def measure() -> None:
        with finite_layers(model):
            model(input_ids=torch.arange(1, 6)[None])
            raise UsageError("prompts must differ", found="alike")

    with pytest.raises(BaseModelError, match=r"layer 'model\.layers\.1\.mlp\.down_proj'"):
        measure()


def test_numbers_that_leave_a_dtype_are_told_from_weights_that_are_none(tiny_model: Make) -> None:
    model = tiny_model(dtype=torch.float16)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(60_000)
    with pytest.raises(BaseModelError, match=r"q_proj' must give finite numbers(.|\n)*out of finite weights"):
        run(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_sound_model_passes_and_is_left_as_it_was(tiny_model: Make, dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    run(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_an_error_of_the_work_itself_passes(tiny_model: Make) -> None:
    with pytest.raises(RuntimeError, match="the work"), finite_layers(tiny_model()):
        raise RuntimeError("the work")


def test_padding_on_the_left_is_no_cause(tiny_model: Make) -> None:
    for attention in ("eager", "sdpa"):
        model = tiny_model(attn_implementation=attention)
        mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
        with finite_layers(model), torch.no_grad():
            model(input_ids=torch.ones(2, 5, dtype=torch.int64), attention_mask=mask)


def vast(model: Any, size: float, alpha: float) -> Adapter:
    path = "model.layers.0.self_attn.q_proj"
    d_out, d_in = model.get_submodule(path).weight.shape
    factors = LoraFactors(torch.full((2, d_in), 0.1), torch.full((d_out, 2), size), alpha / 2)
    return new_adapter("vast", {path: factors}, "tiny")


def test_factors_that_leave_float32_with_their_scaling_are_refused_by_expert_and_layer(
    tiny_model: Make, random_adapter: Make, generator: torch.Generator, tmp_path: Path
) -> None:
    model = tiny_model()
    library = Library.create(tmp_path / "lib", model, base_name="tiny")
    library.add_adapter(random_adapter(model, "sound", generator), {"tasks": ["a"]})
    adapter = vast(model, 1e35, 1e6)
    words = "adapter 'vast' must have factors and a scaling at model.layers.0.self_attn.q_proj that float32 can hold"
    attach(model, library)
    with pytest.raises(AdapterError, match=words):
        add_expert(model, adapter)
    library.add_adapter(adapter, {"tasks": ["b"]})
    with pytest.raises(AdapterError, match=words):
        attach(tiny_model(), library)
