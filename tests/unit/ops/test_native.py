"""The compiled plan against the one in PyTorch, and what happens where it cannot be compiled."""

import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorary.lora.gated import GatedLora
from lorary.lora.plans import gathered
from lorary.ops import native as module
from lorary.ops.blocks import block_norms, split_blocks
from lorary.ops.choose import Choice, Chosen, choose
from lorary.ops.native import NativeRoute, Quick, is_native, native, native_mix
from lorary.route.lag import lag_readout

needs_compiler = pytest.mark.skipif(native() is None, reason="no C++ compiler, or LORARY_NATIVE=0")


@pytest.fixture
def afresh() -> Iterator[None]:
    """What was compiled is forgotten before and after."""
    native.cache_clear()
    yield
    native.cache_clear()


def layer(generator: torch.Generator, ranks: list[int], d_in: int, d_out: int) -> GatedLora:
    down = torch.randn(sum(ranks) + len(ranks), d_in, generator=generator)
    up = torch.randn(sum(ranks), d_out, generator=generator)
    return GatedLora(down, up, torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks)))


def terms(x: Tensor, chosen: Chosen, lora: GatedLora, out: Tensor) -> Tensor:
    """The sum if none of its terms cancelled another: what the error of a sum in float32 is relative to."""
    positive = Chosen(chosen.experts, chosen.weights.abs())
    return out.abs() + gathered(x.abs(), positive, lora.down.abs(), lora.up.abs(), lora.rank_index)


def is_clear(scores: Tensor, top_k: int, rounding: Tensor) -> Tensor:
    """(tokens,) whether another order of summing, off by `rounding`, chooses the same experts."""
    best = scores.topk(min(top_k + 1, scores.shape[1]), dim=1).values
    if best.shape[1] == top_k:
        return torch.ones(len(scores), dtype=torch.bool)
    kth, next_one = best[:, -2], best[:, -1]
    return (next_one == -torch.inf) | (kth - next_one > 2 * rounding)


def matrices_of(lora: GatedLora, ranks: list[int], generator: torch.Generator) -> Tensor:
    """One small matrix for each expert, one below the other."""
    stacked = torch.randn(sum(ranks), max(ranks), generator=generator)
    widths = torch.tensor(ranks)[lora.expert_of_rank]
    return stacked.masked_fill(torch.arange(max(ranks)) >= widths[:, None], 0.0)


def choices(
    stage: str, products: Tensor, matrices: Tensor, ranks: list[int], quick: Quick, x: Tensor, lora: GatedLora
) -> list[tuple[Tensor, int]]:
    """(scores, how many are taken) of each stage in PyTorch, minus infinity for experts that are out of it."""
    out = ~quick.alive
    if stage == "rows":
        return [(products.abs().masked_fill(out, -torch.inf), quick.top_k)]
    z = products if stage == "matrices" else x @ lora.down[: lora.num_ranks].mT
    second = block_norms(z, split_blocks(ranks, matrices), len(ranks)).masked_fill(out, -torch.inf)
    if stage == "matrices":
        return [(second, quick.top_k)]
    first = products.abs().masked_fill(out, -torch.inf)
    return [(first, quick.candidates), (lag_readout(first, second, quick.candidates), quick.top_k)]


@needs_compiler
@given(
    seed=st.integers(0, 10**6),
    stage=st.sampled_from(["rows", "matrices", "both"]),
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    num_tokens=st.sampled_from([1, 3, 8, 9, 40, 300]),
    d_in=st.integers(1, 70),
    d_out=st.sampled_from([1, 5, 16, 47, 64, 70, 513, 1100]),
    threads=st.sampled_from([1, 2, 3]),
)
@example(seed=1312, stage="rows", ranks=[1], num_tokens=1, d_in=62, d_out=1, threads=1)  # a sum of next to nothing
@settings(max_examples=100)
def test_the_compiled_plan_gives_what_pytorch_gives(
    seed: int, stage: str, ranks: list[int], num_tokens: int, d_in: int, d_out: int, threads: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    lora = layer(generator, ranks, d_in, d_out)
    x = torch.randn(num_tokens, d_in, generator=generator)
    matrices, out = matrices_of(lora, ranks, generator), torch.randn(num_tokens, d_out, generator=generator)
    quick = Quick(
        None if stage == "matrices" else lora.prototypes,
        None if stage == "rows" else matrices,
        torch.rand(len(ranks), generator=generator) > 0.2,
        1 + seed % len(ranks),
        1 + seed // 7 % len(ranks),
        0.7,
    )
    route, before = NativeRoute(quick, lora.down, lora.up, lora.starts), torch.get_num_threads()
    products, chosen, before_mixing = x @ route.read.mT, route.room(num_tokens), out.clone()
    torch.set_num_threads(threads)
    try:
        together = route(x, out, products, chosen)
        at_once = route(x, out)
        every_z = (x @ lora.down.mT)[:, : lora.num_ranks]
        mixed = [native_mix(x, chosen, lora.down, lora.up, lora.starts, out, z) for z in (None, every_z)]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out, before_mixing)
    # The same choice, applied twice: no tie plays a part.
    expected, scale = out + gathered(x, chosen, lora.down, lora.up, lora.rank_index), terms(x, chosen, lora, out)
    for found in (together, *mixed):
        assert bool(((found - expected).abs() <= 1e-5 * scale).all())
    # The same products, chosen from twice; away from ties, since norms and sums are rounded in another order.
    stages = choices(stage, products, matrices, ranks, quick, x, lora)
    rounding = 1e-5 * (x.abs() @ lora.down.abs().mT).amax(dim=1) * (1.0 if stage == "rows" else matrices.norm())
    clear = torch.stack([is_clear(scores, k, rounding) for scores, k in stages]).all(dim=0)
    by_pytorch = choose(stages[-1][0], Choice(top_k=quick.top_k, temperature=0.7)).dense(len(ranks))
    error = (chosen.dense(len(ranks)) - by_pytorch).abs().amax(dim=1)
    assert bool((error <= 1e-6 + 4 * rounding)[clear].all())
    error = (at_once - expected).abs() - (1e-5 + 4 * rounding[:, None]) * scale
    assert bool((error <= 0)[clear].all())


STAGES = pytest.mark.parametrize("stage", ["rows", "matrices", "both"])


def quick_of(lora: GatedLora, stage: str, alive: Tensor, top_k: int, generator: torch.Generator) -> Quick:
    matrices = matrices_of(lora, lora.starts.diff().tolist(), generator)
    rows = None if stage == "matrices" else lora.prototypes
    return Quick(rows, None if stage == "rows" else matrices, alive, top_k, len(alive), 1.0)


@needs_compiler
@STAGES
@pytest.mark.parametrize("num_tokens", [2, 20])
def test_a_token_that_is_not_a_number_stays_visible_in_compiled_code(
    generator: torch.Generator, stage: str, num_tokens: int
) -> None:
    lora = layer(generator, [2, 2, 2], 4, 5)
    x = torch.randn(num_tokens, 4, generator=generator)
    x[1, 2] = torch.nan
    quick = quick_of(lora, stage, torch.ones(3, dtype=torch.bool), 1, generator)
    out = NativeRoute(quick, lora.down, lora.up, lora.starts)(x, torch.zeros(num_tokens, 5))
    assert bool(out[[0, *range(2, num_tokens)]].isfinite().all())
    assert bool(out[1].isnan().all())


@needs_compiler
@STAGES
def test_where_no_expert_is_alive_compiled_code_adds_nothing(generator: torch.Generator, stage: str) -> None:
    lora = layer(generator, [2, 3], 4, 5)
    x, base = torch.randn(20, 4, generator=generator), torch.randn(20, 5, generator=generator)
    route = NativeRoute(
        quick_of(lora, stage, torch.zeros(2, dtype=torch.bool), 2, generator), lora.down, lora.up, lora.starts
    )
    chosen = route.room(20)
    assert torch.equal(route(x, base, chosen=chosen), base)
    assert not chosen.weights.any()
    assert torch.equal(native_mix(x, chosen, lora.down, lora.up, lora.starts, base), base)


@needs_compiler
def test_a_candidate_far_behind_in_the_first_stage_may_win_the_second(generator: torch.Generator) -> None:
    lora = layer(generator, [1, 1], 2, 3)
    lora.down.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0], [1e6, 0.0], [1.0, 0.0]]))
    quick = Quick(lora.prototypes, torch.tensor([[1.0], [2.0]]), torch.ones(2, dtype=torch.bool), 1, 2, 1.0)
    route = NativeRoute(quick, lora.down, lora.up, lora.starts)
    chosen = route.room(1)
    route(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 3), chosen=chosen)
    assert chosen.dense(2).tolist() == [[0, 1]]


@needs_compiler
@pytest.mark.usefixtures("afresh")
def test_compiled_code_is_kept_and_shared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORARY_CACHE", str(tmp_path))
    assert native() is not None
    (built,) = (tmp_path / "native").iterdir()
    changed = built.stat().st_mtime_ns
    native.cache_clear()
    assert native() is not None
    assert built.stat().st_mtime_ns == changed


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "truncating"])
def test_without_a_working_compiler_pytorch_does_it(
    compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if compiler == "truncating":  # it ends well and leaves something that is no library
        script = tmp_path / compiler
        script.write_text('#!/bin/sh\nfor last; do :; done\n[ "$1" = --version ] || echo broken > "$last"\n')
        script.chmod(0o755)
        compiler = str(script)
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("LORARY_CACHE", str(tmp_path / "cache"))
    assert native() is None
    assert not is_native(torch.ones(1))


@pytest.mark.usefixtures("afresh")
def test_compiled_code_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("nothing may be run")

    monkeypatch.setenv("LORARY_NATIVE", "0")
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(ctypes, "CDLL", run)
    assert module.native() is None
