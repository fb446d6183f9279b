"""Packed rows give every architecture that may take them the losses and gradients of padded rows, and others do not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lorary.data.packing import Group, micro_batches
from lorary.data.places import places_of
from lorary.data.template import Example
from lorary.lora.seat import seat, unseat
from lorary.lora.stacked import RowTags, StackedLora
from lorary.lora.targets import find_targets
from lorary.model.logits import can_pack, target_losses
from lorary.model.row_attention import attending_rows, collect_states, spread_states

Make = Callable[..., Any]
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2, "head_dim": 8}
GPT = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 600}
EXACT = {
    "Llama": GROUPED,
    "Mistral": {**GROUPED, "sliding_window": 512},
    "Qwen3": GROUPED,
    "Gemma3": {**GROUPED, "sliding_window": 512},
    "GPT2": GPT,
    "GPTNeoX": SHAPE,
}
# A window shorter than a packed sequence, positions in the mask, windows along the sequence, and no attention at all.
REFUSED = {
    "Mistral": {**GROUPED, "sliding_window": 16},
    "Gemma3": {**GROUPED, "sliding_window": 16},
    "Bloom": {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "GPTNeo": {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "num_heads": 4,
    },
    "Mamba": {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "Lfm2": {**SHAPE, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
}


def make(name: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    config_name = {"Gemma3": "Gemma3Text"}.get(name, name)
    model_name = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    config = getattr(transformers, f"{config_name}Config")(**settings, pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, model_name)(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            # Larger than usual, so that what a token sees decides its loss.
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(1))
    return model.to(dtype).requires_grad_(False).eval()


def some_groups(generator: torch.Generator) -> list[Group]:
    """Two units: rows that begin alike, some of them inside others or twice; rows that have less in common."""

    def ids(number: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, 300, (number,), generator=generator).tolist())

    start, other = ids(12), ids(7)
    alike = [Example(start + ids(i % 3), ids(1 + i % 4), 0) for i in range(6)]
    alike += [alike[3], Example(start, alike[0].target_ids, 0)]
    return [
        Group(0, 0, alike, range(len(alike))),
        Group(1, 0, [Example(other[:i] + ids(4), ids(2), 0) for i in range(1, 8)], range(7)),
    ]


def losses_and_gradients(model: Any, groups: list[Group], *, share_prefix: bool) -> tuple[Tensor, list[Tensor], int]:
    """Summed loss of each unit, gradients of all factors, and how many tokens were computed."""
    tags, leaves, modules = RowTags(), [], {}
    draw = torch.Generator().manual_seed(2)
    for path, (d_in, d_out) in find_targets(model, ["all-linear"]).items():
        shapes = ((2, 3, d_in), (2, d_out, 3))
        own = [(0.1 * torch.randn(s, generator=draw, dtype=model.dtype)).requires_grad_() for s in shapes]
        leaves += own
        modules[path] = StackedLora(*own, torch.tensor([1.0, 2.0], dtype=model.dtype), tags, path)
    handles = seat(model, modules)
    losses, tokens = torch.zeros(2, dtype=model.dtype), 0
    try:
        for micro in micro_batches(groups, 80, share_prefix=share_prefix):
            tags.set(micro)
            each = target_losses(model, micro.batch)
            each.sum().backward()
            losses.index_add_(0, micro.target_slots, each.detach())
            tokens += micro.batch.input_ids.numel()
    finally:
        unseat(model, list(modules), handles)
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert len(gradients) == len(leaves)
    return losses, gradients, tokens


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", EXACT)
def test_packed_rows_have_the_losses_and_gradients_of_padded_ones(
    name: str, attention: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers rounds to float32 inside norms and softmax, which would hide errors up to that; not so here.
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    model = make(name, EXACT[name], torch.float64)
    model.set_attn_implementation(attention)
    assert can_pack(model)
    groups = some_groups(generator)
    padded, padded_gradients, padded_tokens = losses_and_gradients(model, groups, share_prefix=False)
    packed, packed_gradients, packed_tokens = losses_and_gradients(model, groups, share_prefix=True)
    assert packed_tokens < 0.7 * padded_tokens
    assert torch.allclose(packed, padded, rtol=1e-9, atol=0)
    for found, wanted in zip(packed_gradients, padded_gradients, strict=True):
        assert float((found - wanted).abs().max()) <= 1e-9 * float(wanted.abs().max())


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_whose_result_would_change_takes_no_packed_rows(name: str) -> None:
    assert not can_pack(make(name, REFUSED[name]))


def test_an_attention_that_takes_other_masks_takes_no_packed_rows(tiny_model: Make) -> None:
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    assert not can_pack(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_does_not_hide_that_packing_is_exact(tiny_model: Make, dtype: torch.dtype) -> None:
    assert can_pack(tiny_model(dtype=dtype))


def test_a_model_that_overlooks_the_rows_is_found_out(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    plain = model.forward
    monkeypatch.setattr(model, "forward", lambda lorary_places=None, **inputs: plain(**inputs))
    assert not can_pack(model)


def test_a_model_is_set_to_its_own_attention_again(tiny_model: Make, generator: torch.Generator) -> None:
    model = tiny_model()
    (micro,) = micro_batches(some_groups(generator), 1000, share_prefix=True)
    with pytest.raises(IndexError), attending_rows(model, micro.batch):
        target_losses(model, micro.batch._replace(input_ids=micro.batch.input_ids + 1000))
    assert model.config._attn_implementation == "sdpa"
    padded = micro_batches(some_groups(generator), 1000, share_prefix=False)[0]
    with attending_rows(model, padded.batch):
        assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("wanted", ["tokens", "all but shared ones"])
def test_gradients_pass_through_attention_to_rows_as_the_numerical_ones(
    wanted: str, generator: torch.Generator
) -> None:
    places = places_of([[0, 1, 2], [0, 1, 3, 4], [5]] if wanted == "tokens" else [[0], [1, 2], [3, 4, 5, 6]])
    num_tokens = len(places.owners)
    states = torch.randn(num_tokens, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    spread = torch.randn(len(places.tokens), 2, generator=generator, dtype=torch.float64, requires_grad=True)
    is_padding = torch.ones(len(places.tokens), dtype=torch.bool)
    is_padding[places.owners] = is_padding[places.repeats] = False

    def without_padding(states: Tensor) -> Tensor:
        return spread_states(states, places).masked_fill(is_padding[:, None, None], 0.0)

    assert torch.autograd.gradcheck(without_padding, (states,))
    assert torch.autograd.gradcheck(lambda states: collect_states(states, places), (spread,))
