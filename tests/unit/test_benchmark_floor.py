"""The arithmetic floor counts the products that a step cannot leave out, and no others."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lorary.lora.targets import find_targets


@pytest.fixture
def floor(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import floor

    return floor


def test_a_gradient_passes_only_above_the_lowest_adapted_layer(tiny_model: Any, floor: ModuleType) -> None:
    model = tiny_model()
    targets = set(find_targets(model, ["q_proj", "o_proj"], layers=[1]))
    base, head = floor.find_products(model, targets)
    assert len(base) == 14
    # The layers below have none to pass, nor have q_proj, k_proj and v_proj above them.
    assert [product.passes_gradient for product in base] == [False] * 10 + [True] * 4
    assert [i for i, product in enumerate(base) if product.is_adapted] == [7, 10]
    assert base[0].weight.shape == (32, 32)
    assert head.weight.shape == (32, 300)


def test_the_floor_takes_time_and_leaves_the_model_alone(tiny_model: Any, floor: ModuleType) -> None:
    model = tiny_model()
    ids = torch.arange(6)[None]
    before = model(input_ids=ids).logits
    targets = find_targets(model, ["all-linear"])
    seconds = floor.floor_seconds(model, targets, tokens=20, target_tokens=3, rank=2, num_units=3, repeats=1)
    assert seconds > 0
    assert torch.equal(model(input_ids=ids).logits, before)
