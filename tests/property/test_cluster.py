"""The mathematics of comparing adapters: what may change without changing the result."""

import warnings
from typing import Any

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorary.adapter import Adapter, LoraFactors
from lorary.cluster.kmeans import mean_silhouette
from lorary.cluster.mbc import cluster_adapters
from lorary.cluster.similarity import adapter_gram, adapter_similarity
from lorary.cluster.sketch import DeltaSketcher, delta_sketches
from lorary.ops import gram as gram_module
from lorary.ops.gram import delta_gram, row_gram

SEED = st.integers(0, 2**31)
SHAPES = {"first": (24, 32), "second": (32, 16)}
few = settings(max_examples=15)


def normal(seed: int, *size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_adapters(seed: int, ranks: list[int], dtype: torch.dtype = torch.float64) -> list[Adapter]:
    adapters = []
    for i, rank in enumerate(ranks):
        modules = {
            path: LoraFactors(
                normal(seed + 97 * i + j, rank, d_in).to(dtype), normal(seed - 89 * i - j, d_out, rank).to(dtype), 0.5
            )
            for j, (path, (d_in, d_out)) in enumerate(SHAPES.items())
        }
        adapters.append(Adapter(f"n{i}", modules, {}))
    return adapters


def regauged(adapter: Adapter, seed: int) -> Adapter:
    """The same update in other factors: A -> GA, B -> BG⁻¹ with a condition of at most 10."""
    modules = {}
    for path, f in adapter:
        left, values = torch.linalg.qr(normal(seed, f.rank, f.rank)).Q, torch.logspace(0, 1, f.rank).double()
        modules[path] = LoraFactors((left * values) @ f.lora_a, f.lora_b @ (left / values).mT, f.scaling)
    return Adapter(adapter.name, modules, {})


@few
@given(SEED, st.lists(st.integers(1, 4), min_size=2, max_size=5))
def test_the_gauge_changes_no_similarity_and_no_sketch(seed: int, ranks: list[int]) -> None:
    adapters = random_adapters(seed, ranks)
    others = [regauged(adapter, seed + i) for i, adapter in enumerate(adapters)]
    assert torch.allclose(adapter_similarity(adapters), adapter_similarity(others), rtol=0, atol=1e-9)
    sketches, again = delta_sketches(adapters), delta_sketches(others)
    assert torch.allclose(sketches, again, rtol=0, atol=1e-9 * float(sketches.abs().max()))


@few
@given(SEED, st.permutations(range(7)), st.sampled_from(["delta", "paper-2024", "sketch"]))
def test_the_order_of_the_adapters_changes_nothing(seed: int, order: list[int], method: str) -> None:
    adapters = {adapter.name: adapter for adapter in random_adapters(seed, [3] * 7)}
    names = list(adapters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # these adapters have as many initial draws as there are
        first = cluster_adapters(names, adapters.__getitem__, k=3, method=method)
        other = cluster_adapters([names[i] for i in order], adapters.__getitem__, k=3, method=method)
    assert other.labels == tuple(first.labels[i] for i in order)
    assert torch.equal(other.similarity, first.similarity[order][:, order])
    assert other.nearest == first.nearest
    assert (other.cohesion, other.silhouette) == (first.cohesion, first.silhouette)


@few
@given(SEED, st.lists(st.integers(1, 4), min_size=1, max_size=9), st.integers(1, 6))
def test_the_gram_matrix_does_not_depend_on_the_blocks(seed: int, ranks: list[int], block: int) -> None:
    lora_a, lora_b = normal(seed, sum(ranks), 9), normal(seed + 1, 6, sum(ranks))
    owner = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))
    whole = delta_gram(lora_a, lora_b, owner, len(ranks))
    before = gram_module.BLOCK_ROWS
    gram_module.BLOCK_ROWS = block
    try:
        blocked, rows = delta_gram(lora_a, lora_b, owner, len(ranks)), row_gram(lora_a)
    finally:
        gram_module.BLOCK_ROWS = before
    assert torch.allclose(whole, blocked, rtol=1e-9, atol=1e-9)
    assert torch.equal(blocked, blocked.mT)
    assert torch.allclose(rows, lora_a @ lora_a.mT, rtol=1e-9, atol=1e-9)
    assert torch.equal(rows, rows.mT)


@few
@given(SEED, st.sampled_from([0, 1, 2, 3]))
def test_float32_products_keep_the_cosines_in_a_bad_gauge_too(seed: int, decades: int) -> None:
    from lorary.cluster import similarity as module

    exact = random_adapters(seed, [3, 3, 3, 2])
    shear = torch.eye(3, dtype=torch.float64)
    shear[0, 1] = 10.0**decades
    sheared = {path: (shear @ f.lora_a, f.lora_b @ torch.linalg.inv(shear)) for path, f in exact[0]}
    stored = [
        Adapter(a.name, {path: LoraFactors(f.lora_a.float(), f.lora_b.float(), f.scaling) for path, f in a}, {})
        for a in exact
    ]
    modules = {path: LoraFactors(lora_a.float(), lora_b.float(), 0.5) for path, (lora_a, lora_b) in sheared.items()}
    before = module.CHEAP
    module.CHEAP = 0.0  # as if there were a thousand of them
    try:
        found = adapter_similarity([Adapter("n0", modules, {}), *stored[1:]])
    finally:
        module.CHEAP = before
    # Numbers stored in float32 are off by 6e-8 themselves, a thousand times more after the shear.
    assert torch.allclose(found, adapter_similarity(exact), rtol=0, atol=1e-5)


@settings(few, max_examples=3)
@given(SEED)
def test_sketches_are_without_bias(seed: int) -> None:
    adapters = random_adapters(seed, [2, 1, 3])
    exact = adapter_gram(adapters)
    runs = torch.stack([(s := delta_sketches(adapters, size=6, seed=run)) @ s.mT for run in range(300)])
    error = runs.mean(0) - exact
    standard = runs.std(0) / 300**0.5
    assert bool((error.abs() < 5 * standard).all())


@few
@given(SEED)
def test_a_sketch_as_wide_as_one_layer_is_exact(seed: int) -> None:
    adapters = [Adapter(a.name, {"first": a.modules["first"]}, {}) for a in random_adapters(seed, [2, 3])]
    sketches = delta_sketches(adapters, size=40)
    assert torch.allclose(sketches @ sketches.mT, adapter_gram(adapters), rtol=1e-5)


@few
@given(SEED, st.floats(-3, 3))
def test_a_sketch_is_linear_in_the_update(seed: int, factor: float) -> None:
    assume(abs(factor) > 1e-3)
    (adapter,) = random_adapters(seed, [3])
    scaled = Adapter("n", {path: LoraFactors(f.lora_a, f.lora_b, f.scaling * factor) for path, f in adapter}, {})
    sketcher = DeltaSketcher()
    assert torch.allclose(sketcher(scaled), factor * sketcher(adapter), rtol=1e-9)


@few
@given(SEED, st.lists(st.integers(0, 3), min_size=5, max_size=12))
def test_the_silhouette_is_that_of_scikit_learn(seed: int, labels: list[int]) -> None:
    from sklearn.metrics import silhouette_score

    points = normal(seed, len(labels), 6)
    points /= points.norm(dim=1, keepdim=True)
    similarity = (points @ points.mT).fill_diagonal_(1.0)
    found: Any = mean_silhouette(similarity, labels)
    if not 1 < len(set(labels)) < len(labels):
        assert found is None
        return
    distance = (1 - similarity).clamp_min(0).numpy()
    assert abs(found - silhouette_score(distance, labels, metric="precomputed")) < 1e-9
