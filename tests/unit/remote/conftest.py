"""A small library over the tiny base model, and adapters that fit it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorary.adapter import Adapter, LoraFactors
from lorary.formats.peft_config import new_config
from lorary.library.store import Library

MakeAdapter = Callable[..., Adapter]
PATH = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def make_adapter() -> MakeAdapter:
    """An adapter of rank 2 whose weights all have one value: `make_adapter("sst2", 0.5)`."""

    def make(name: str, value: float = 1.0) -> Adapter:
        factors = LoraFactors(torch.full((2, 32), value), torch.full((32, 2), value), 2.0)
        return Adapter(name, {PATH: factors}, new_config(None, rank=2, alpha=4, target_modules=[PATH]))

    return make


@pytest.fixture
def make_library(tmp_path: Path, tiny_base_folder: Path, make_adapter: MakeAdapter) -> Callable[..., Library]:
    """A library with adapters of given values: `make_library("lib", a=1.0, b=2.0)`."""

    def make(folder: str, **values: float) -> Library:
        library = Library.create(tmp_path / folder, tiny_base_folder)
        for name, value in values.items():
            library.add_adapter(make_adapter(name, value), {"tasks": [name]})
        return library

    return make
