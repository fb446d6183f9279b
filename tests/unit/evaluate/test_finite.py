"""Logits that are no numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorary.errors import BaseModelError
from lorary.evaluate.finite import finite_logits


def run(model: Any, add: float, positions: int = 1) -> None:
    """A pass whose last logits have something added to one word."""
    head = model.get_output_embeddings()

    def spoil(_head: Any, _args: Any, logits: torch.Tensor) -> torch.Tensor:
        spoilt = logits.clone()
        spoilt[:, -positions:, 7] += add
        return spoilt

    handle = head.register_forward_hook(spoil)
    try:
        with finite_logits(model):
            model(input_ids=torch.arange(1, 6)[None])
            model(input_ids=torch.arange(2, 9)[None])
    finally:
        handle.remove()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_logit_that_is_no_number_is_found(tiny_model: Callable[..., Any], value: float) -> None:
    with pytest.raises(BaseModelError, match="found: 2 of them"):
        run(tiny_model(), value)


@pytest.mark.parametrize("value", [0.0, float("-inf"), 1e30])
def test_finite_logits_and_words_that_are_ruled_out_pass(tiny_model: Callable[..., Any], value: float) -> None:
    run(tiny_model(), value)


def test_the_model_is_left_as_it_was(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    run(model, 0.0)
    with pytest.raises(RuntimeError, match="the work"), finite_logits(model):
        raise RuntimeError("the work")
    assert not model.get_output_embeddings()._forward_hooks


@pytest.mark.parametrize("path", ["model.norm", "lm_head"])
def test_vast_logits_of_a_vast_weight_are_refused(tiny_model: Callable[..., Any], path: str) -> None:
    model = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.get_submodule(path).weight[..., 0] = 1e30
    with pytest.raises(BaseModelError, match=rf"logits below 1e\+16(.|\n)*1e\+30 in the weights, in {path}\.weight"):
        run(model, 0.0)
