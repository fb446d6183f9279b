"""Choosing: what settings are refused, and the rows in which little or nothing may be chosen."""

import pytest
import torch

from lorary.errors import UsageError
from lorary.ops.choose import check_choice, top_k_softmax


@pytest.mark.parametrize("top_k", [0, -1])
def test_a_top_k_below_one_is_refused(top_k: int) -> None:
    with pytest.raises(UsageError, match=f"top_k must be at least 1\nfound: {top_k}"):
        check_choice(top_k, 1.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_no_positive_number_is_refused(temperature: float) -> None:
    with pytest.raises(UsageError, match="temperature must be a positive number"):
        check_choice(4, temperature)


def test_where_nothing_may_be_chosen_all_weights_are_zero() -> None:
    scores = torch.tensor([[-torch.inf, -torch.inf, -torch.inf], [1.0, -torch.inf, 1.0]])
    assert top_k_softmax(scores, 2, 1.0).tolist() == [[0, 0, 0], [0.5, 0, 0.5]]
    assert top_k_softmax(scores, 9, 1.0).tolist() == [[0, 0, 0], [0.5, 0, 0.5]]


def test_a_score_that_is_not_a_number_stays_visible() -> None:
    assert bool(top_k_softmax(torch.tensor([[float("nan"), 1.0, 2.0]]), 2, 1.0).isnan().any())


def test_large_scores_and_low_temperatures_do_not_overflow() -> None:
    weights = top_k_softmax(torch.tensor([[1e4, 2e4, -1e4]]), 2, 1e-3)
    assert weights.tolist() == [[0, 1, 0]]
