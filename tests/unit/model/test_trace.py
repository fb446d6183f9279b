"""The trace shows what was chosen: shapes, sums, padding, cached generation, beams."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorary.errors import UsageError
from lorary.model.attach import routing
from lorary.model.trace import trace

Make = Callable[..., Any]
IDS = torch.arange(1, 13).view(2, 6)
FIRST = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def routed(tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator) -> Any:
    """Four experts; 'd' adapts the second layer only."""
    model = tiny_model()
    adapters = [random_adapter(model, name, generator) for name in "abc"]
    return route(model, [*adapters, random_adapter(model, "d", generator, layers=[1])], top_k=2)


def test_weights_sum_to_one_over_at_most_top_k_experts(routed: Any) -> None:
    with trace(routed) as traced:
        routed(input_ids=IDS)
    assert traced.experts == ("a", "b", "c", "d")
    assert len(traced.layers) == 6
    assert traced.layers[0] == FIRST
    assert traced.stacked().shape == (6, 2, 6, 4)
    assert torch.allclose(traced.stacked().sum(-1), torch.ones(6, 2, 6))
    assert ((traced.stacked() > 0).sum(-1) <= 2).all()
    assert (traced.weights(FIRST)[..., 3] == 0).all()
    assert traced.stacked()[3:, ..., 3].any()


def test_usage_is_the_mean_over_the_layers_that_an_expert_has(routed: Any) -> None:
    with trace(routed) as traced:
        routed(input_ids=IDS)
    means = traced.stacked().mean(dim=(1, 2))  # (layers, experts), without padding
    expected = [*means[:, :3].mean(dim=0).tolist(), float(means[3:, 3].mean())]  # 'd' has the last three alone
    assert list(traced.usage().values()) == pytest.approx(expected)


def test_padding_is_left_out_of_usage(routed: Any) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]])
    with trace(routed) as traced:
        routed(input_ids=IDS, attention_mask=mask)
    assert torch.equal(traced.mask(), mask.bool())
    usage = list(traced.usage().values())[:3]  # of the experts that have every layer
    assert usage == pytest.approx(traced.stacked()[:, mask.bool(), :3].mean(dim=(0, 1)).tolist())
    assert usage != pytest.approx(traced.stacked()[..., :3].mean(dim=(0, 1, 2)).tolist())


def test_a_mask_given_by_position_counts_as_one_given_by_name(routed: Any) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]])
    with trace(routed) as traced:
        routed(IDS, mask)
    assert torch.equal(traced.mask(), mask.bool())


@pytest.mark.parametrize("router_in_between", [None, "base"])
def test_cached_generation_reads_as_one_row_of_positions(routed: Any, router_in_between: str | None) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with trace(routed) as traced:
        if router_in_between is not None:
            with routing(routed, router_in_between):  # decides nothing, records nothing, and shifts no mask
                routed(input_ids=IDS)
        tokens = routed.generate(IDS, attention_mask=mask, **settings)
    grown = torch.cat([mask, torch.ones(2, 3, dtype=mask.dtype)], dim=1)  # the last token is never fed
    assert traced.stacked().shape == (6, 2, 9, 4)
    assert torch.equal(traced.mask(), grown.bool())
    with trace(routed) as at_once:
        positions = (grown.cumsum(1) - 1).clamp_min(0)
        routed(input_ids=tokens[:, :-1], attention_mask=grown, position_ids=positions)
    kept = grown.bool()
    assert torch.allclose(traced.stacked()[:, kept], at_once.stacked()[:, kept], atol=1e-5)


def test_a_chunk_fed_to_a_filled_cache_takes_its_own_part_of_the_mask(routed: Any) -> None:
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    with trace(routed) as traced:
        cache = routed(input_ids=IDS[:, :2], attention_mask=mask[:, :2], use_cache=True).past_key_values
        routed(input_ids=IDS[:, 2:], attention_mask=mask, past_key_values=cache)
    assert torch.equal(traced.mask(), mask.bool())


def test_a_row_of_a_beam_search_is_a_place_in_the_beam(routed: Any) -> None:
    with trace(routed) as traced:
        routed.generate(
            IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, min_new_tokens=3, num_beams=2, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
    assert traced.stacked().shape == (6, 4, 8, 4)
    assert torch.allclose(traced.stacked().sum(-1), torch.ones(6, 4, 8))


def test_passes_of_other_batch_sizes_are_refused(routed: Any) -> None:
    with trace(routed) as traced:
        routed(input_ids=IDS)
        routed(input_ids=IDS[:1])
    with pytest.raises(UsageError, match=r"must have one batch size\nfound: \[1, 2\]"):
        traced.usage()


def test_a_router_with_fixed_weights_records_nothing(routed: Any) -> None:
    with trace(routed) as traced, routing(routed, "uniform"):
        routed(input_ids=IDS)
    assert traced.layers == []
    for read in (traced.usage, traced.stacked, traced.mask, lambda: traced.weights(FIRST)):
        with pytest.raises(UsageError, match="under a router that looks at tokens"):
            read()
    with pytest.raises(UsageError, match="the layer must be a routed one\nfound: lm_head"):
        traced.weights("lm_head")


def test_traces_nest_and_end_with_their_block(routed: Any) -> None:
    with trace(routed) as outer:
        routed(input_ids=IDS)
        with trace(routed) as inner:
            routed(input_ids=IDS)
        with pytest.raises(KeyError), trace(routed):
            raise KeyError
        routed(input_ids=IDS)
    routed(input_ids=IDS)
    assert outer.weights(FIRST).shape == (2, 18, 4)
    assert inner.weights(FIRST).shape == (2, 6, 4)
    assert not routed._forward_pre_hooks


def test_a_bare_model_cannot_be_traced(tiny_model: Make) -> None:
    with pytest.raises(UsageError, match="must be a routed one"), trace(tiny_model()):
        pass
