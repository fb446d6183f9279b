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
from lorary.ops import native as module
from lorary.ops.choose import Choice, Chosen, choose
from lorary.ops.mix import mix_chosen
from lorary.ops.native import NativeRoute, is_native, native, native_choose, native_mix

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
    return out.abs() + mix_chosen(x.abs(), positive, lora.down.abs(), lora.up.abs(), lora.rows)


def is_clear(scores: Tensor, top_k: int, rounding: Tensor) -> Tensor:
    """(tokens,) whether another order of summing, off by `rounding`, chooses the same experts."""
    best = scores.topk(min(top_k + 1, scores.shape[1]), dim=1).values
    if best.shape[1] == top_k:
        return torch.ones(len(scores), dtype=torch.bool)
    kth, next_one = best[:, -2], best[:, -1]
    return (next_one == -torch.inf) | (kth - next_one > 2 * rounding)


@needs_compiler
@given(
    seed=st.integers(0, 10**6),
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    num_tokens=st.sampled_from([1, 3, 8, 9, 40, 300]),
    d_in=st.integers(1, 70),
    d_out=st.integers(1, 70),
    threads=st.sampled_from([1, 2, 3]),
)
@example(seed=1312, ranks=[1], num_tokens=1, d_in=62, d_out=1, threads=1)  # what is added leaves next to nothing
@settings(max_examples=60)
def test_the_compiled_plan_gives_what_pytorch_gives(
    seed: int, ranks: list[int], num_tokens: int, d_in: int, d_out: int, threads: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    lora = layer(generator, ranks, d_in, d_out)
    x = torch.randn(num_tokens, d_in, generator=generator)
    alive = torch.rand(len(ranks), generator=generator) > 0.2
    rows = lora.down[lora.num_ranks :]
    top_k, before = 1 + seed % len(ranks), torch.get_num_threads()
    out = torch.randn(num_tokens, d_out, generator=generator)
    torch.set_num_threads(threads)
    try:
        scores = x @ rows.mT
        chosen = native_choose(scores, alive, top_k, 0.7)
        together = out.clone()
        native_mix(x, chosen, lora.down, lora.up, lora.starts, together)
        at_once = NativeRoute(rows, alive, top_k, 0.7, lora.down, lora.up, lora.starts)(x, out)
    finally:
        torch.set_num_threads(before)
    # The same choice, applied twice: no tie plays a part.
    expected = out + mix_chosen(x, chosen, lora.down, lora.up, lora.rows)
    assert bool(((together - expected).abs() <= 1e-5 * terms(x, chosen, lora, out)).all())
    # The same scores, chosen from twice: only scores that are equal may be taken in another order.
    magnitudes = scores.abs().masked_fill(~alive, -torch.inf)
    by_pytorch = choose(magnitudes, Choice(top_k=top_k, temperature=0.7))
    clear = is_clear(magnitudes, top_k, torch.zeros(num_tokens))
    assert torch.allclose(chosen.dense(len(ranks))[clear], by_pytorch.dense(len(ranks))[clear], atol=1e-6)
    # Scores summed in another order: they and the weights are off by what float32 rounds.
    clear = is_clear(magnitudes, top_k, 1e-5 * (x.abs() @ rows.abs().mT).amax(dim=1))
    assert bool(((at_once - expected).abs() <= 1e-4 * terms(x, chosen, lora, out))[clear].all())


@needs_compiler
def test_a_score_that_is_not_a_number_stays_visible_in_compiled_code(generator: torch.Generator) -> None:
    lora = layer(generator, [2, 2, 2], 4, 5)
    x = torch.randn(2, 4, generator=generator)
    x[1, 2] = torch.nan
    alive = torch.ones(3, dtype=torch.bool)
    out = NativeRoute(lora.down[6:], alive, 1, 1.0, lora.down, lora.up, lora.starts)(x, torch.zeros(2, 5))
    assert bool(out[0].isfinite().all())
    assert bool(out[1].isnan().all())


@needs_compiler
def test_where_no_expert_is_alive_compiled_code_adds_nothing(generator: torch.Generator) -> None:
    lora = layer(generator, [2, 3], 4, 5)
    x, out = torch.randn(20, 4, generator=generator), torch.ones(20, 5)
    chosen = native_choose(torch.ones(20, 2), torch.zeros(2, dtype=torch.bool), 2, 1.0)
    assert not chosen.weights.any()
    native_mix(x, chosen, lora.down, lora.up, lora.starts, out)
    assert torch.equal(out, torch.ones(20, 5))


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
