"""Putting adapters together: each way equals its definition on the full updates, and the error told is the true one."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.adapters import write_adapter

from lorary.adapter import LoraFactors
from lorary.errors import AdapterError
from lorary.formats.peft import read_adapter
from lorary.formats.peft_patterns import new_adapter
from lorary.merge.layers import mixed_layers
from lorary.merge.sums import have_one_rank, mean_of, sum_factors, sum_updates
from lorary.merge.truncate import truncate

SHAPES = {"model.layers.0.self_attn.q_proj": (7, 5), "model.layers.1.mlp.down_proj": (4, 6)}
Q, DOWN = SHAPES


def adapter_of(
    generator: torch.Generator, rank: int, scaling: float, paths: tuple[str, ...] = (Q, DOWN)
) -> dict[str, LoraFactors]:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {path: LoraFactors(draw(rank, SHAPES[path][0]), draw(SHAPES[path][1], rank), scaling) for path in paths}


def weights_of(adapters: list[dict[str, LoraFactors]], generator: torch.Generator) -> dict[str, torch.Tensor]:
    layers = mixed_layers(adapters)
    return {
        path: torch.randn(len(layer.members), generator=generator, dtype=torch.float64)
        for path, layer in layers.items()
    }


def delta(modules: Mapping[str, LoraFactors], path: str) -> torch.Tensor:
    d_in, d_out = SHAPES[path]
    return modules[path].delta() if path in modules else torch.zeros(d_out, d_in, dtype=torch.float64)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 99), ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_updates_are_summed_exactly_whatever_the_ranks_scalings_and_layers(seed: int, ranks: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    paths = [(Q, DOWN), (Q,), (DOWN,), (Q, DOWN)]
    adapters = [adapter_of(generator, rank, rank / 2, paths[i]) for i, rank in enumerate(ranks)]
    weights = weights_of(adapters, generator)
    summed = sum_updates(adapters, weights)
    for path, layer in mixed_layers(adapters).items():
        wanted = sum(w * delta(adapters[m], path) for w, m in zip(weights[path], layer.members, strict=True))
        assert torch.allclose(summed[path].delta(), torch.as_tensor(wanted), rtol=1e-12, atol=1e-12)
        assert summed[path].rank == sum(ranks[member] for member in layer.members)


def test_factors_are_summed_apart_and_each_scaling_counts(generator: torch.Generator) -> None:
    adapters = [adapter_of(generator, 2, scaling) for scaling in (4.0, 0.5)]
    weights = weights_of(adapters, generator)
    summed = sum_factors(adapters, weights)
    for path in SHAPES:
        (one, other), (u, v) = (modules[path] for modules in adapters), weights[path]
        up = u * 4.0 * one.lora_b + v * 0.5 * other.lora_b
        assert torch.allclose(summed[path].delta(), up @ (u * one.lora_a + v * other.lora_a))


def test_a_sum_of_factors_cannot_take_an_update_away(generator: torch.Generator) -> None:
    alone = [adapter_of(generator, 2, 4.0)]
    minus = {path: torch.tensor([-1.0]) for path in SHAPES}
    assert torch.allclose(sum_factors(alone, minus)[Q].delta(), alone[0][Q].delta())
    assert torch.allclose(sum_updates(alone, minus)[Q].delta(), -alone[0][Q].delta())


def test_factors_of_unequal_ranks_are_refused_by_layer(generator: torch.Generator) -> None:
    adapters = [adapter_of(generator, 2, 4.0), adapter_of(generator, 3, 4.0, (DOWN,))]
    assert not have_one_rank(adapters)
    with pytest.raises(
        AdapterError, match=r"factors of layer 'model.layers.1.mlp.down_proj' .*\nfound: ranks \[2, 3\]"
    ):
        sum_factors(adapters, weights_of(adapters, generator))


def test_layers_of_other_shapes_are_refused(generator: torch.Generator) -> None:
    adapters = [adapter_of(generator, 1, 1.0), {Q: adapter_of(generator, 1, 1.0)[DOWN]}]
    with pytest.raises(AdapterError, match=r"layer '.*q_proj' must have one \(d_in, d_out\)"):
        mixed_layers(adapters)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 99), rank=st.integers(1, 5), kept=st.integers(1, 5), scaling=st.floats(0.1, 8))
def test_truncation_is_the_best_of_its_rank_and_tells_the_true_error(
    seed: int, rank: int, kept: int, scaling: float
) -> None:
    adapter = adapter_of(torch.Generator().manual_seed(seed), rank, 3.0)
    cut = truncate(adapter, kept, scaling)
    lost = total = 0.0
    for path, factors in adapter.items():
        whole, found = factors.delta(), cut.modules[path]
        left, values, right = torch.linalg.svd(whole, full_matrices=False)
        best = (left[:, :kept] * values[:kept]) @ right[:kept]
        assert found.rank <= kept
        assert torch.allclose(found.delta(), best, atol=1e-10)
        lost += float((whole - found.delta()).square().sum())
        total += float(whole.square().sum())
    assert cut.error == pytest.approx((lost / total) ** 0.5, abs=1e-9)
    if rank <= kept:
        assert cut.modules == adapter


@pytest.mark.parametrize("mix", ["factors", "outputs"])
def test_the_mean_of_copies_is_the_adapter(mix: str, generator: torch.Generator) -> None:
    adapter = adapter_of(generator, 3, 4.0)
    made = mean_of([adapter] * 3, mix, None)
    assert made.error == pytest.approx(0.0, abs=1e-7)
    for path, factors in adapter.items():
        assert made.modules[path].rank == 3
        assert torch.allclose(made.modules[path].delta(), factors.delta())


def test_an_adapter_of_unequal_ranks_and_scalings_comes_back_from_its_files(
    generator: torch.Generator, tmp_path: Path
) -> None:
    modules = {Q: adapter_of(generator, 3, 1 / 3)[Q], DOWN: adapter_of(generator, 2, 0.7)[DOWN]}
    made = new_adapter("made", modules, "tiny")
    write_adapter(made, tmp_path)
    read = read_adapter(tmp_path)
    for path, factors in modules.items():
        assert torch.allclose(read.modules[path].delta(), factors.delta(), rtol=1e-12)
