"""Each way to merge against its definition on the full updates, in float64, whatever the ranks, scalings and layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils
from torch import Tensor

from lorary.adapt.merge_settings import MERGES
from lorary.adapter import LoraFactors
from lorary.merge.catalogue import METHODS, InCore, OnFactors, OnUpdates, merge_adapters
from lorary.merge.core_space import core_space, factors_of_core
from lorary.merge.dare import drop
from lorary.merge.layers import mixed_layers
from lorary.merge.ties import elect_and_average, ties
from lorary.merge.truncate import closest_of_rank

SHAPES = {"layers.0.q_proj": (9, 7), "layers.1.down_proj": (6, 8)}
Q, DOWN = SHAPES
Adapters = dict[str, dict[str, LoraFactors]]
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"density": 0.4} for name in ("ties", "core-ties", "prune", "dare", "dare-ties", "ties-factors")},
    "iso-cts": {"common": 0.5},
    "pico": {"strength": 1.0},
}
# One expert stays what it is, where nothing is dropped.
WHOLE = {
    **{name: {"density": 1.0} for name, options in OPTIONS.items() if "density" in options},
    "pico": {"strength": 1.0},
}
NO_LOSS = [name for name in MERGES if not name.startswith("iso")]
UNEQUAL = [name for name in MERGES if not isinstance(METHODS[name], OnFactors) or name in ("mean", "concat")]


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def adapter_of(generator: torch.Generator, rank: int, scaling: float, *paths: str) -> dict[str, LoraFactors]:
    return {
        path: LoraFactors(draw(generator, rank, SHAPES[path][0]), draw(generator, SHAPES[path][1], rank), scaling)
        for path in paths or (Q, DOWN)
    }


def adapters_of(seed: int) -> Adapters:
    """Three adapters of unequal ranks and scalings, one of which lacks a layer."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "one": adapter_of(generator, 1, 2.0),
        "two": adapter_of(generator, 2, 4 / 2**0.5),
        "three": adapter_of(generator, 1, 0.5, Q),
    }


def deltas(adapters: Adapters, path: str) -> Tensor:
    return torch.stack([modules[path].delta() for modules in adapters.values() if path in modules])


def members(adapters: Adapters, weights: list[float], path: str) -> Tensor:
    pairs = zip(weights, adapters.values(), strict=True)
    return torch.tensor([weight for weight, modules in pairs if path in modules], dtype=torch.float64)


def merged_at_full_rank(method: str, adapters: Adapters, weights: list[float], **changes: Any) -> dict[str, Tensor]:
    options = OPTIONS.get(method, {}) | changes
    rank = 10 if isinstance(METHODS[method], OnUpdates) else None
    merged = merge_adapters(method, adapters, weights, rank=rank, **options)
    assert merged.error < 1e-7
    return {path: factors.delta() for path, factors in merged.modules.items()}


def test_the_settings_name_every_method() -> None:
    assert tuple(METHODS) == MERGES


def dense_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    is_there = values > 1e-9 * values[0]
    return left[:, is_there], values[is_there], right[is_there]


def dense_polar(columns: Tensor) -> Tensor:
    left, _, right = dense_svd(columns)
    return left @ right


def dense_iso_c(updates: Tensor, weights: Tensor) -> Tensor:
    left, values, right = dense_svd(torch.tensordot(weights, updates, dims=1))
    return float(values.mean()) * left @ right


def dense_tsv(updates: Tensor, weights: Tensor) -> Tensor:
    triples = [dense_svd(update) for update in updates]
    left = torch.cat([triple[0] for triple in triples], dim=1)
    right = torch.cat([triple[2] for triple in triples])
    values = torch.cat([weight * triple[1] for weight, triple in zip(weights, triples, strict=True)])
    return dense_polar(left) @ torch.diag(values) @ dense_polar(right.mT).mT


def dense_iso_cts(updates: Tensor, weights: Tensor) -> Tensor:
    left, values, right = dense_svd(torch.tensordot(weights, updates, dims=1))
    each = int(0.5 * len(values)) // len(updates)
    common = len(values) - each * len(updates)
    parts = [(left[:, :common], values[:common], right[:common])]
    for update, weight in zip(updates, weights, strict=True):
        outside = update - left[:, :common] @ left[:, :common].mT @ update
        own_left, own_values, own_right = dense_svd(weight * outside)
        parts.append((own_left[:, :each], own_values[:each], own_right[:each]))
    mean = float(torch.cat([part[1] for part in parts]).mean())
    outputs = dense_polar(torch.cat([part[0] for part in parts], dim=1))
    return mean * outputs @ dense_polar(torch.cat([part[2] for part in parts]).mT).mT


def dense_pico(updates: Tensor, weights: Tensor) -> Tensor:
    total = torch.tensordot(weights, updates, dims=1)
    unit = updates / updates.flatten(1).norm(dim=1)[:, None, None]
    left, _, _ = dense_svd(torch.cat(list(unit), dim=1))
    shrunk = torch.zeros_like(total)
    for direction in left.mT:
        energies = torch.stack([(direction @ update).square().sum() for update in unit])
        users = float(energies.sum() ** 2 / energies.square().sum())
        shrunk += torch.outer(direction, direction @ total) / users
    return shrunk * total.norm() / shrunk.norm()


def dense_ties(updates: Tensor, weights: Tensor) -> Tensor:
    trimmed = torch.zeros_like(updates)
    for kept, update, weight in zip(trimmed, updates, weights, strict=True):
        smallest = update.abs().flatten().sort(descending=True).values[round(0.4 * update.numel()) - 1]
        kept[update.abs() >= smallest] = (weight * update)[update.abs() >= smallest]
    result = torch.zeros_like(updates[0])
    for i in range(result.shape[0]):
        for j in range(result.shape[1]):
            entries = [float(value) for value in trimmed[:, i, j] if value != 0]
            agreeing = [value for value in entries if value * sum(entries) > 0]
            result[i, j] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return result


def dense_sum(updates: Tensor, weights: Tensor) -> Tensor:
    return torch.tensordot(weights, updates, dims=1)


def dense_prune(updates: Tensor, weights: Tensor) -> Tensor:
    return merge_utils.magnitude_prune(list(updates), weights, 0.4)


DENSE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": dense_sum, "concat": dense_sum, "ties": dense_ties, "tsv": dense_tsv, "iso-c": dense_iso_c,
    "iso-cts": dense_iso_cts, "pico": dense_pico,
}  # fmt: skip


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000), method=st.sampled_from(sorted(DENSE)), negative=st.booleans())
def test_a_method_is_its_definition_on_full_updates(seed: int, method: str, negative: bool) -> None:
    adapters, weights = adapters_of(seed), [0.5, -1.5 if negative else 1.5, 1.0]
    merged = merged_at_full_rank(method, adapters, weights)
    for path in SHAPES:
        wanted = DENSE[method](deltas(adapters, path), members(adapters, weights, path))
        assert torch.allclose(merged[path], wanted, atol=1e-6 * float(wanted.abs().max())), path


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), method=st.sampled_from(UNEQUAL))
def test_the_order_of_experts_and_the_way_an_update_is_factored_change_nothing(seed: int, method: str) -> None:
    adapters, weights = adapters_of(seed), [0.5, 1.5, 1.0]
    turn = torch.linalg.qr(draw(torch.Generator().manual_seed(seed), 2, 2)).Q
    turned = {
        path: LoraFactors(3.0 * turn @ f.lora_a, f.lora_b @ turn.mT / 6.0, 2 * f.scaling)
        for path, f in adapters["two"].items()
    }
    other = {"three": adapters["three"], "two": turned, "one": adapters["one"]}
    merged = merged_at_full_rank(method, adapters, weights)
    for path, update in merged_at_full_rank(method, other, weights[::-1]).items():
        assert torch.allclose(merged[path], update, atol=1e-7 * float(update.abs().max()))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), method=st.sampled_from(UNEQUAL))
def test_updates_twice_as_large_give_a_merge_twice_as_large(seed: int, method: str) -> None:
    adapters, weights = adapters_of(seed), [0.5, 1.5, 1.0]
    larger = {
        name: {path: LoraFactors(f.lora_a, f.lora_b, 2 * f.scaling) for path, f in modules.items()}
        for name, modules in adapters.items()
    }
    merged, doubled = (merged_at_full_rank(method, each, weights) for each in (adapters, larger))
    weighed = merged_at_full_rank(method, adapters, [2 * weight for weight in weights])
    for path, update in merged.items():
        assert torch.allclose(doubled[path], 2 * update)
        assert torch.allclose(weighed[path], 2 * update)


@pytest.mark.parametrize("method", NO_LOSS)
def test_one_expert_stays_what_it_is(method: str) -> None:
    adapters = {"two": adapters_of(3)["two"]}
    merged = merged_at_full_rank(method, adapters, [1.0], **WHOLE.get(method, {}))
    for path, factors in adapters["two"].items():
        assert torch.allclose(merged[path], factors.delta())


@pytest.mark.parametrize("method", [name for name in NO_LOSS if name not in ("linear", "concat")])
def test_equal_experts_are_one_of_them(method: str) -> None:
    copies = {name: adapters_of(3)["two"] for name in ("one", "two", "three")}
    is_sum = method in ("mean", "mu", "prune", "dare", "pico", "tsv")
    merged = merged_at_full_rank(
        method, copies, [1 / 3 if is_sum and method != "tsv" else 1.0] * 3, **WHOLE.get(method, {})
    )
    for path, factors in copies["one"].items():
        assert torch.allclose(merged[path], factors.delta())


@pytest.mark.parametrize("method", ["iso-c", "iso-cts"])
def test_isotropic_merges_have_one_singular_value(method: str) -> None:
    for update in merged_at_full_rank(method, adapters_of(1), [1.0, 1.0, 1.0]).values():
        values = dense_svd(update)[1]
        assert torch.allclose(values, values[:1].expand_as(values), rtol=1e-6)


def test_entries_that_are_small_or_outvoted_are_dropped() -> None:
    entries = torch.tensor([[3.0, 0.1, -2.0, 0.0], [1.0, 0.2, 4.0, 0.0], [0.1, 5.0, -1.0, 0.0]])[:, None]
    # Two of four are kept of each: [3, ., -2, .], [1, ., 4, .], [., 5, -1, .]
    assert ties(entries, torch.ones(3), density=0.5).tolist() == [[2.0, 5.0, 4.0, 0.0]]
    assert torch.equal(ties(entries[:1], torch.ones(1), density=1.0), entries[0])


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000))
def test_ties_and_pruning_are_those_of_peft_on_full_updates(seed: int) -> None:
    adapters, weights = adapters_of(seed), [2.0, 2.0, 2.0]
    merged, pruned = (merged_at_full_rank(method, adapters, weights, density=0.5) for method in ("ties", "prune"))
    for path in SHAPES:
        updates, by_expert = list(deltas(adapters, path)), members(adapters, weights, path)
        # Halves are rounded down there and to even here: both layers have an even number of entries but one.
        if updates[0].numel() % 2 == 0:
            assert torch.allclose(merged[path], merge_utils.ties(updates, by_expert, 0.5))
            assert torch.allclose(pruned[path], merge_utils.magnitude_prune(updates, by_expert, 0.5))


def test_dare_drops_by_seed_layer_and_name_alone_and_keeps_the_expectation() -> None:
    adapters = adapters_of(5)
    first, again, other = (merged_at_full_rank("dare", adapters, [1.0, 1.0, 1.0], seed=seed)[Q] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    without = {name: adapters[name] for name in ("one", "three")}
    alone = merged_at_full_rank("dare", {"two": adapters["two"]}, [1.0])[Q]
    assert torch.allclose(merged_at_full_rank("dare", without, [1.0, 1.0])[Q] + alone, first)
    update = torch.ones(1, 400, 500, dtype=torch.float64)
    dropped = drop(update, 0.2, [torch.Generator().manual_seed(0)])
    assert set(dropped.unique().tolist()) == {0.0, 5.0}
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.02)


def test_dare_ties_elects_signs_of_what_was_not_dropped() -> None:
    updates = torch.tensor([[[1.0, -2.0]], [[-3.0, -4.0]]])
    assert elect_and_average(updates).tolist() == [[-3.0, -3.0]]


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000))
def test_the_core_space_holds_all_updates_exactly(seed: int) -> None:
    adapters = adapters_of(seed)
    for path, layer in mixed_layers(list(adapters.values())).items():
        space = core_space(layer)
        for core, update in zip(space.cores, deltas(adapters, path), strict=True):
            assert torch.allclose(space.outputs @ core @ space.inputs.mT, update)
            assert torch.allclose(factors_of_core(core, space).delta(), update)
        assert max(space.cores.shape[1:]) <= layer.num_ranks


def test_ranks_beyond_the_size_of_a_layer_are_merged_in_the_whole_layer(generator: torch.Generator) -> None:
    adapters = {name: adapter_of(generator, 5, 1.0) for name in ("one", "two")}
    for method in [name for name, way in METHODS.items() if isinstance(way, InCore)]:
        merged = merged_at_full_rank(method, adapters, [1.0, 1.0])
        assert all(bool(torch.isfinite(update).all()) for update in merged.values())
    total = {path: adapters["one"][path].delta() + adapters["two"][path].delta() for path in SHAPES}
    merged = merged_at_full_rank("pico", adapters, [1.0, 1.0], strength=0.0)
    assert all(torch.allclose(merged[path], total[path]) for path in SHAPES)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000), rank=st.integers(1, 8), is_tall=st.booleans())
def test_a_full_update_is_truncated_to_its_best_and_the_error_is_true(seed: int, rank: int, is_tall: bool) -> None:
    update = draw(torch.Generator().manual_seed(seed), *((9, 6) if is_tall else (6, 9)))
    closest = closest_of_rank(update, rank)
    left, values, right = torch.linalg.svd(update, full_matrices=False)
    assert torch.allclose(closest.factors.delta(), (left[:, :rank] * values[:rank]) @ right[:rank], atol=1e-9)
    assert closest.lost == pytest.approx(float(values[rank:].square().sum()), abs=1e-9)
    assert closest.total == pytest.approx(float(values.square().sum()))


def test_a_zero_update_is_merged_into_a_zero_update() -> None:
    nothing = {"a": {Q: LoraFactors(torch.zeros(2, 9), torch.zeros(7, 2), 1.0)}}
    for method in MERGES:
        merged = merge_adapters(method, nothing, [1.0], **OPTIONS.get(method, {}))
        assert not merged.modules[Q].delta().any()
        assert merged.error == 0.0
