"""The mathematics of what routing weights say: entropies, usage, agreement of two routers, tokens that stand out."""

from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorary.evaluate.routing import agreement, as_shares, entropy, expert_use, measure, norm_ratios

SEEDS = st.integers(0, 2**32 - 1)
QUICK = settings(max_examples=25)
SCALES = st.sampled_from(["softmax", "unit", "null", "none"])


def random_weights(seed: int, scale: str = "softmax", pairs: int = 12, experts: int = 5) -> Tensor:
    """Three experts of each pair; `null` leaves the base a part, `none` leaves some pairs to it altogether."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(pairs, experts, generator=generator)
    chosen = torch.zeros(pairs, experts).scatter(1, scores.topk(3, dim=1).indices, 1.0)
    if scale == "unit":
        return chosen
    weights = chosen * scores.exp()
    weights = weights / weights.sum(dim=1, keepdim=True)
    if scale == "null":
        weights = weights * torch.rand(pairs, 1, generator=generator)
    return weights * (torch.rand(pairs, 1, generator=generator) > 0.5) if scale == "none" else weights


@QUICK
@given(SEEDS, SCALES)
def test_shares_sum_to_one_and_keep_the_proportions_of_experts(seed: int, scale: str) -> None:
    weights = random_weights(seed, scale)
    shares = as_shares(weights)
    assert torch.allclose(shares.sum(dim=-1), torch.ones(12, dtype=torch.float64), atol=1e-12)
    assert bool((shares >= 0).all())
    total = weights.double().sum(dim=-1, keepdim=True).clamp_min(1)
    assert torch.allclose(shares[:, :-1], weights.double() / total, atol=1e-6)


@QUICK
@given(SEEDS, SCALES)
def test_the_mean_share_is_at_least_as_spread_as_single_choices(seed: int, scale: str) -> None:
    shares = as_shares(random_weights(seed, scale))
    found = measure(shares)
    assert -1e-12 <= found.entropy <= found.balance + 1e-12 <= log(6) + 1e-9
    assert bool((entropy(shares) <= log(3) + 1e-6).all() | (scale == "null"))
    alike = measure(shares[:1].expand(7, -1))
    assert alike.information == pytest.approx(0, abs=1e-12)


@QUICK
@given(SEEDS, SCALES)
def test_the_order_of_experts_and_of_pairs_permutes_usage_and_nothing_else(seed: int, scale: str) -> None:
    weights = random_weights(seed, scale)
    generator = torch.Generator().manual_seed(seed)
    experts, pairs = torch.randperm(5, generator=generator), torch.randperm(12, generator=generator)
    found, other = measure(as_shares(weights)), measure(as_shares(weights[pairs][:, experts]))
    assert torch.allclose(found.usage[experts], other.usage)
    assert (found.entropy, found.balance) == pytest.approx((other.entropy, other.balance))


@QUICK
@given(SEEDS, SCALES, SCALES)
def test_agreement_is_symmetric_within_bounds_and_whole_with_itself(seed: int, scale: str, other_scale: str) -> None:
    one, other = as_shares(random_weights(seed, scale)), as_shares(random_weights(seed + 1, other_scale))
    assert agreement(one, other) == pytest.approx(agreement(other, one))
    assert all(0 <= value <= 1 for value in agreement(one, other))
    assert agreement(one, one) == pytest.approx((1, 1, 0))


@QUICK
@given(SEEDS)
def test_agreement_looks_at_pairs_one_by_one(seed: int) -> None:
    one, other = as_shares(random_weights(seed)), as_shares(random_weights(seed + 1))
    single = torch.tensor([agreement(a[None], b[None]) for a, b in zip(one, other, strict=True)], dtype=torch.float64)
    assert agreement(one, other) == pytest.approx(single.mean(dim=0).tolist())


@QUICK
@given(SEEDS, SCALES)
def test_usage_is_what_a_trace_means_by_it_and_nobody_leads_unchosen(seed: int, scale: str) -> None:
    weights = random_weights(seed, scale).view(3, 4, 5)
    uses = expert_use(as_shares(weights), torch.ones(3, 5, dtype=torch.bool))
    divided = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1)
    assert [use.usage for use in uses] == pytest.approx(divided.mean(dim=(0, 1)).tolist(), abs=1e-6)
    assert all(use.leads <= use.chosen <= 1 for use in uses)
    assert sum(use.leads for use in uses) <= 1 + 1e-9


@QUICK
@given(SEEDS, st.floats(0.01, 100))
def test_how_far_a_token_stands_out_depends_on_no_scale(seed: int, factor: float) -> None:
    norms = torch.rand(4, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    scaled = norms * torch.tensor([[factor], [1.0], [1 / factor], [3.0]], dtype=torch.float64)
    assert torch.allclose(norm_ratios(norms), norm_ratios(scaled))
    assert bool((norm_ratios(norms) >= 1).any())
