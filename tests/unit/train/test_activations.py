"""Activation checkpointing changes what is kept between forward and backward, and nothing else."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.train.activations import recomputed
from lorary.train.units import Job

Make = Callable[..., Any]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_gives_the_same_and_keeps_less(
    tiny_model: Make, jobs: list[Job], loop_settings: Make, train: Make, dropout: float
) -> None:
    model, queue = tiny_model(dtype=torch.float64, num_hidden_layers=4), [replace(job, num_steps=2) for job in jobs]
    kept: dict[bool, int] = {}
    units = {}
    for does in (False, True):
        sizes: list[int] = []

        def count(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        settings = loop_settings(dropout=dropout, activation_checkpointing=does)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            units[does] = train(model, queue, settings)
        kept[does] = sum(sizes)
    assert kept[True] < kept[False] / 2
    for one, other in zip(units[False], units[True], strict=True):
        assert one.train_losses == pytest.approx(other.train_losses, rel=1e-12)
        for path, factors in one.adapters[one.name].items():
            torch.testing.assert_close(factors.lora_b, other.adapters[one.name][path].lora_b, rtol=1e-9, atol=1e-12)


def test_a_forward_that_was_set_on_a_layer_comes_back(tiny_model: Make) -> None:
    model = tiny_model()
    first, second = model.model.layers
    own = first.forward = first.forward
    with recomputed(model, ["model.layers.1.self_attn.q_proj"]):
        assert first.forward is not own
        assert "forward" in vars(second)
    assert first.forward is own
    assert "forward" not in vars(second)
