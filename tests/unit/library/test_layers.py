"""The table of a base model's layers: only numbers as models write them name a layer, and no table takes the memory."""

from typing import Any

import pytest

from lorary.library.layers import LayerShapes

TABLE = LayerShapes.of({f"model.layers.{layer}.q_proj": (4, 8) for layer in range(12)} | {"lm_head": (4, 16)})


def test_layers_are_found_by_their_paths() -> None:
    assert TABLE.shape("model.layers.0.q_proj") == TABLE.shape("model.layers.11.q_proj") == (4, 8)
    assert TABLE.shape("lm_head") == (4, 16)
    assert len(list(TABLE)) == 13


@pytest.mark.parametrize(
    "number",
    ["00", "01", "+1", " 1", "1 ", "1\n", "1_0", "\u0663", "\u0967", "\uff11", "\u00b2", "-1", "*", "12", "9" * 5000],
)
def test_a_number_that_no_model_writes_names_no_layer(number: str) -> None:
    assert TABLE.shape(f"model.layers.{number}.q_proj") is None


@pytest.mark.parametrize(
    "numbers",
    [
        ["0-10000000000"],
        ["0-999999999"],
        ["0-900000", "0-900000"],
        ["9" * 5000],
        ["\u0661"],
        [""],
        ["0", "0"],
        [3],
        ["0-"],
    ],
)
def test_a_row_that_claims_too_much_is_refused_before_it_is_unfolded(numbers: list[Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        LayerShapes.from_json({"model.layers.*.q_proj": {"d_in": 4, "d_out": 8, "numbers": numbers}})


def test_many_rows_may_not_claim_too_much_together() -> None:
    row = {"d_in": 4, "d_out": 8, "numbers": ["0-60000"]}
    with pytest.raises(ValueError, match="more than 100,000"):
        LayerShapes.from_json({"a.*.q_proj": row, "b.*.q_proj": row})


def test_rows_of_no_layer_may_not_claim_too_much_together() -> None:
    row = {"d_in": 4, "d_out": 8, "numbers": ["5-3", "0-60000"]}
    with pytest.raises(ValueError, match="more than 100,000"):
        LayerShapes.from_json({"a.*.q_proj.*": row, "b.*.q_proj.*": row})
