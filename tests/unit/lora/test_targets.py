"""Which layers a choice of targets means."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorary.errors import UsageError
from lorary.lora.seat import linear_shape
from lorary.lora.targets import find_targets, layer_number, num_layers

Make = Callable[..., Any]


def test_targets_are_found_by_the_last_part_of_their_path(tiny_model: Make) -> None:
    assert find_targets(tiny_model(), ["k_proj", "down_proj"], [1]) == {
        "model.layers.1.self_attn.k_proj": (32, 16),
        "model.layers.1.mlp.down_proj": (48, 32),
    }


def test_all_linear_means_every_linear_layer_but_the_head(tiny_model: Make) -> None:
    found = find_targets(tiny_model(), ["all-linear"])
    assert len(found) == 14
    assert "lm_head" not in found
    assert num_layers(tiny_model()) == 2
    assert layer_number("model.norm") is None


@pytest.mark.parametrize("targets", [["q_proj", "qproj"], ["qproj"], []])
def test_a_target_that_names_nothing_is_refused(tiny_model: Make, targets: list[str]) -> None:
    with pytest.raises(UsageError, match="every target module must name linear layers of LlamaForCausalLM"):
        find_targets(tiny_model(), targets)


def test_a_layer_number_that_does_not_exist_is_refused(tiny_model: Make) -> None:
    with pytest.raises(UsageError, match=r"layer numbers must exist in the base model\nfound: \[2, 9\]"):
        find_targets(tiny_model(), ["q_proj"], [0, 2, 9])


def test_linear_layers_are_told_by_their_shape() -> None:
    assert linear_shape(nn.Linear(3, 4)) == (3, 4)
    assert linear_shape(Conv1D(4, 3)) == (3, 4)
    assert linear_shape(nn.LayerNorm(3)) is None
    assert linear_shape(nn.Embedding(3, 4)) is None
