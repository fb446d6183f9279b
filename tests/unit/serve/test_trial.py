"""Which base models can answer many at once is found out by trying."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.families import tiny_family

from lorary.errors import BaseModelError
from lorary.model.base import load_base
from lorary.serve.batching import RoutedEngine
from lorary.serve.row_cache import RowCache
from lorary.serve.trial import check_serves


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2", "phi3", "qwen2_moe", "bloom", "gpt_oss"])
def test_rows_of_families_with_keys_and_values_are_what_they_are_alone(family: str) -> None:
    check_serves(tiny_family(family))


@pytest.mark.parametrize("family", ["mamba", "qwen3_next", "jamba"])
def test_families_that_keep_other_states_are_refused(family: str) -> None:
    with pytest.raises(BaseModelError, match="must keep keys and values of each token"):
        check_serves(tiny_family(family))


def test_rows_that_see_what_is_not_theirs_are_noticed(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = RowCache.mask
    monkeypatch.setattr(RowCache, "mask", lambda self, num_new: torch.ones_like(mask(self, num_new)))
    with pytest.raises(BaseModelError, match="logits that differ"):
        check_serves(tiny_model(dtype=torch.float64))


def test_an_engine_over_a_base_that_cannot_be_served_does_not_start(
    tiny_base_folder: Path, random_adapter: Callable[..., Any], route: Callable[..., Any], generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    base = load_base(str(tiny_base_folder))
    route(base.model, [random_adapter(base.model, "a", generator)])
    monkeypatch.setattr(RowCache, "advance", lambda self, num_new: None)
    engine = RoutedEngine(base)
    with pytest.raises(BaseModelError, match="to answer many at once"):
        asyncio.run(engine.start())
    assert not engine.is_ready
