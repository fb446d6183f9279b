"""The compiled plan against the one in PyTorch, and what happens where it cannot be compiled."""

import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorary.lora.gated import GatedLora
from lorary.ops import native as module
from lorary.ops.choose import Choice, choose
from lorary.ops.mix import mix_chosen
from lorary.ops.native import is_native, native, native_choose, native_mix, native_route

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


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= 1e-5 * expected.norm())


@needs_compiler
@given(
    seed=st.integers(0, 10**6),
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    num_tokens=st.sampled_from([1, 3, 8, 9, 40, 300]),
    d_in=st.integers(1, 70),
    d_out=st.integers(1, 70),
    threads=st.sampled_from([1, 2, 3]),
)
@settings(deadline=None, max_examples=60)
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
        together, at_once = out.clone(), out.clone()
        native_mix(x, chosen, lora.down, lora.up, lora.starts, together)
        native_route(x, rows, alive, top_k, 0.7, lora.down, lora.up, lora.starts, at_once)
    finally:
        torch.set_num_threads(before)
    expected = choose(scores.abs().masked_fill(~alive, -torch.inf), Choice(top_k=top_k, temperature=0.7))
    assert torch.allclose(chosen.dense(len(ranks)), expected.dense(len(ranks)), atol=1e-6)
    delta = mix_chosen(x, expected, lora.down, lora.up, lora.rows)
    assert close(together, out + delta)
    assert close(at_once, out + delta)


@needs_compiler
def test_a_score_that_is_not_a_number_stays_visible_in_compiled_code(generator: torch.Generator) -> None:
    lora = layer(generator, [2, 2, 2], 4, 5)
    x = torch.randn(2, 4, generator=generator)
    x[1, 2] = torch.nan
    out = torch.zeros(2, 5)
    native_route(x, lora.down[6:], torch.ones(3, dtype=torch.bool), 1, 1.0, lora.down, lora.up, lora.starts, out)
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
