"""Attaching and evaluating while another process changes the library: one state of it, or a refusal that says so."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import lorary
from lorary.adapter import Adapter, LoraFactors
from lorary.errors import LibraryError
from lorary.evaluate.cache import ResultCache
from lorary.formats.peft_config import new_config
from lorary.library.store import Library
from lorary.model.seating import seating

PATH = "model.layers.0.self_attn.q_proj"
# Forking is how a writer becomes a process of its own within milliseconds; its children use no threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:.*ambiguous:UserWarning")


def adapter_of(name: str, value: float) -> Adapter:
    factors = LoraFactors(torch.full((1, 32), value), torch.ones(32, 1), 2.0)
    return Adapter(name, {PATH: factors}, new_config(None, rank=1, alpha=2, target_modules=[PATH]))


@pytest.fixture
def library(tmp_path: Path, tiny_base_folder: Path) -> Library:
    library = Library.create(tmp_path / "lib", tiny_base_folder)
    for name in ("x", "y"):
        library.add_adapter(adapter_of(name, 1.0), {})
    return library


def seated(library: Library, model: Any) -> list[float]:
    """The value of each expert that is seated."""
    lorary.attach(model, library, router="uniform")
    down = seating(model).layers[PATH].lora.down
    lorary.detach(model)
    return [float(row.unique()) for row in down[:2]]


@contextmanager
def writer(library: Library) -> Iterator[None]:
    """Another process that replaces x, then y, each by the next value; so x is ahead of y by one at most."""
    child = os.fork()
    if not child:
        for value in range(2, 10_000):
            for name in ("x", "y"):
                library.replace_adapter(adapter_of(name, float(value)), {})
                time.sleep(0.03)
        os._exit(0)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_model_gets_the_experts_of_one_moment_beside_a_writer(library: Library, tiny_model: Any) -> None:
    model, seen = tiny_model(), set()
    with writer(library):
        for _ in range(12):
            x, y = seated(library, model)
            assert x - y in (0, 1)
            seen.add((x, y))
    assert len(seen) > 1


def test_a_writer_between_two_adapters_makes_attach_begin_again(
    library: Library, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x is read before the change, y after it: a pair that the library never held."""
    get, other, changes = Library.get, Library.open(library.path), iter(("x", "y"))

    def get_slowly(self: Library, name: str) -> Adapter:
        adapter = get(self, name)
        for changed in changes:
            other.replace_adapter(adapter_of(changed, 2.0), {})
        return adapter

    monkeypatch.setattr(Library, "get", get_slowly)
    assert seated(library, tiny_model()) == [2.0, 2.0]


def test_an_evaluation_beside_a_writer_is_refused(library: Library) -> None:
    cache = ResultCache(library, "base")
    cache.check_experts()

    def check_for_long() -> None:
        until = time.monotonic() + 20
        while time.monotonic() < until:
            cache.check_experts()

    with writer(library), pytest.raises(LibraryError, match=r"must stay as they are while it is evaluated"):
        check_for_long()
