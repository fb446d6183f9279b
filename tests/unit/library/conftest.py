"""A small library over the tiny base model, and adapters that fit it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.support.adapters import write_adapter

from lorary.adapter import Adapter, LoraFactors
from lorary.formats.peft_config import new_config
from lorary.library.store import Library

PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
MakeAdapter = Callable[..., Adapter]


def adapter_of(name: str, value: float = 1.0, base_name: str | None = None) -> Adapter:
    """An adapter of rank 2 whose weights all have one value, so that a mixture of two adapters shows."""
    factors = LoraFactors(torch.full((2, 32), value), torch.full((32, 2), value), 2.0)
    return Adapter(
        name, dict.fromkeys(PATHS, factors), new_config(base_name, rank=2, alpha=4, target_modules=["q_proj"])
    )


@pytest.fixture
def make_adapter() -> MakeAdapter:
    return adapter_of


@pytest.fixture
def library(tmp_path: Path, tiny_base_folder: Path) -> Library:
    """An empty library."""
    return Library.create(tmp_path / "lib", tiny_base_folder)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A PEFT folder named sst2 that fits the library's base and names none."""
    write_adapter(adapter_of("sst2"), tmp_path / "sst2")
    return tmp_path / "sst2"
