"""The factorised spectrum equals the spectrum of the full update, whatever the ranks, gaps and gauges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorary.ops.choose import top_k_softmax
from lorary.ops.gram import delta_gram
from lorary.ops.spectrum import fix_signs, low_rank_spectrum
from lorary.route.arrow import arrow_prototypes

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 12))  # rank, d_in, d_out
SEED = st.integers(0, 2**31)
fixed = settings(max_examples=40)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@fixed
@given(SHAPES, SEED)
def test_the_spectrum_is_that_of_the_full_update(shape: tuple[int, int, int], seed: int) -> None:
    rank, d_in, d_out = shape
    lora_a, lora_b = normal(seed, 2, rank, d_in), normal(seed + 1, 2, d_out, rank)
    values, directions = low_rank_spectrum(lora_a, lora_b)
    k = min(shape)
    expected = torch.linalg.svdvals(lora_b @ lora_a)[:, :k]
    assert values.shape == (2, k)
    assert directions.shape == (2, k, d_in)
    assert torch.allclose(values, expected, rtol=1e-9, atol=1e-9)
    assert torch.allclose(directions @ directions.mT, torch.eye(k, dtype=torch.float64), atol=1e-9)
    stretched = (lora_b @ lora_a @ directions.mT).norm(dim=1)  # each direction is stretched by its value
    assert torch.allclose(stretched, expected, rtol=1e-8, atol=1e-8)


@fixed
@given(SEED, st.integers(1, 3))
def test_a_rank_deficient_update_has_zeros_and_finite_directions(seed: int, true_rank: int) -> None:
    lora_a, lora_b = normal(seed, true_rank, 10), normal(seed + 1, 7, true_rank)
    doubled_a, doubled_b = torch.cat([lora_a, lora_a]), torch.cat([lora_b, lora_b], dim=1)
    values, directions = low_rank_spectrum(doubled_a, doubled_b)
    expected = 2 * low_rank_spectrum(lora_a, lora_b).values
    assert torch.allclose(values[:true_rank], expected, rtol=1e-9)
    assert (values[true_rank:] < 1e-12 * values[0]).all()
    assert bool(torch.isfinite(directions).all())


@pytest.mark.parametrize("gap", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prototypes_equal_those_of_a_full_svd(gap: float, dtype: torch.dtype) -> None:
    left, right = torch.linalg.qr(normal(1, 8, 48, 4)).Q, torch.linalg.qr(normal(2, 8, 40, 4)).Q
    values = gap ** torch.arange(4, dtype=torch.float64)
    lora_a, lora_b = right.mT.to(dtype), (left * values).to(dtype)
    prototypes, ratio = arrow_prototypes(lora_a, lora_b)
    full = torch.linalg.svd(lora_b.double() @ lora_a.double()).Vh[:, 0]
    assert ((prototypes * full).sum(-1).abs() > 1 - 1e-12).all()
    assert torch.allclose(ratio, torch.tensor(gap, dtype=torch.float64), atol=1e-6)


def test_prototypes_have_the_same_bits_in_every_call_and_place() -> None:
    lora_a, lora_b = normal(1, 6, 4, 33), normal(2, 6, 21, 4)
    together, ratio = arrow_prototypes(lora_a, lora_b)
    assert torch.equal(arrow_prototypes(lora_a, lora_b)[0], together)
    backwards, _ = arrow_prototypes(lora_a.flip(0), lora_b.flip(0))
    assert torch.equal(backwards.flip(0), together)
    for i in range(6):
        alone, alone_ratio = arrow_prototypes(lora_a[i : i + 1], lora_b[i : i + 1])
        assert torch.equal(alone[0], together[i])
        assert torch.equal(alone_ratio[0], ratio[i])


@fixed
@given(SEED, st.floats(-3, 3))
def test_fixing_signs_forgets_the_sign_and_nothing_else(seed: int, exponent: float) -> None:
    vectors = normal(seed, 5, 7) * 10**exponent
    found = fix_signs(vectors)
    assert torch.equal(found, fix_signs(-vectors))
    assert torch.equal(found.abs(), vectors.abs())
    assert (found.gather(1, found.abs().argmax(1, keepdim=True)) > 0).all()
    assert torch.equal(fix_signs(torch.zeros(1, 3)), torch.zeros(1, 3))


@fixed
@given(SEED, st.integers(1, 12), st.floats(0.05, 20), st.integers(0, 7))
def test_routing_weights_are_a_softmax_over_the_best(seed: int, top_k: int, temperature: float, dead: int) -> None:
    scores = normal(seed, 6, 8)
    scores[:, :dead] = -torch.inf
    weights = top_k_softmax(scores, top_k, temperature)
    assert torch.allclose(weights.sum(-1), torch.ones(6, dtype=torch.float64))
    for own, score in zip(weights, scores, strict=True):
        best = sorted(range(dead, 8), key=lambda e: -float(score[e]))[:top_k]
        powers = {e: float(torch.exp((score[e] - score[best[0]]) / temperature)) for e in best}
        expected = [powers.get(e, 0.0) / sum(powers.values()) for e in range(8)]
        assert own.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-15)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(top_k_softmax(scores[:, order], top_k, temperature), weights[:, order], rtol=1e-12)


@fixed
@given(SEED, st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_the_gram_matrix_is_that_of_the_full_updates(seed: int, ranks: list[int]) -> None:
    factors = [(normal(seed + i, rank, 9), normal(seed - i, 6, rank)) for i, rank in enumerate(ranks)]
    expert_of_rank = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))
    gram = delta_gram(
        torch.cat([a for a, _ in factors]), torch.cat([b for _, b in factors], dim=1), expert_of_rank, len(ranks) + 1
    )
    deltas = torch.stack([*((b @ a).flatten() for a, b in factors), torch.zeros(54, dtype=torch.float64)])
    assert torch.allclose(gram, deltas @ deltas.mT, rtol=1e-9, atol=1e-9)
