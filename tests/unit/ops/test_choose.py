"""Choosing: what settings are refused, and the rows in which little or nothing may be chosen."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.errors import UsageError
from lorary.ops.choose import Choice, check_choice, choose, top_k_softmax
from lorary.ops.normalise import normalise, normalise_products


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


def dense(scores: Tensor, **steps: Any) -> Tensor:
    return choose(scores, Choice(**steps)).dense(scores.shape[1])


SCORES = torch.tensor([[4.0, 3.0, 2.0, 1.0, -torch.inf]], dtype=torch.float64)


def chosen(**steps: Any) -> list[int]:
    return dense(SCORES, **{"top_k": 9, **steps}).nonzero()[:, 1].tolist()


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [0, 1]),
        # The shares are 0.644, 0.237, 0.087 and 0.032.
        ({"top_p": 0.6}, [0]),
        ({"top_p": 0.65}, [0, 1]),
        ({"top_p": 0.9}, [0, 1, 2]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"top_p": 1e-9}, [0]),
        # Of the first two alone, the first has 0.731.
        ({"top_p": 0.7, "top_k": 2}, [0]),
        ({"top_p": 0.7, "temperature": 10.0}, [0, 1, 2]),
        ({"threshold": 2.0}, [0, 1, 2]),
        ({"threshold": 5.0}, []),
        ({"null": 2.5, "top_k": 3}, [0, 1]),
        ({"null": 9.0, "top_k": 1}, []),
    ],
)
def test_each_step_leaves_the_experts_it_should(steps: dict[str, Any], expected: list[int]) -> None:
    for scale in ("softmax", "unit", "uniform", "proportional"):
        assert chosen(scale=scale, **steps) == expected


def test_the_scales_differ_in_the_weights_alone() -> None:
    def weights(**steps: Any) -> list[float]:
        found: list[float] = dense(SCORES, top_k=2, **steps)[0].tolist()
        return found

    assert weights() == pytest.approx([0.7310586, 0.2689414, 0, 0, 0])
    assert weights(scale="unit") == [1, 1, 0, 0, 0]
    assert weights(scale="uniform") == [0.5, 0.5, 0, 0, 0]


def test_proportional_weights_are_shares_of_the_scores_whatever_the_temperature() -> None:
    for temperature in (0.1, 1.0, 7.0):
        found = dense(SCORES, top_k=3, temperature=temperature, scale="proportional")
        assert found[0].tolist() == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0, 0])
    with_null = dense(SCORES, top_k=2, null=3.5, scale="proportional")
    assert with_null[0].tolist() == pytest.approx([4 / 7.5, 0, 0, 0, 0])


def test_scores_that_are_not_above_zero_have_no_share() -> None:
    scores = torch.tensor([[3.0, 0.0, -2.0], [0.0, -1.0, -torch.inf]])
    assert dense(scores, scale="proportional").tolist() == [[1, 0, 0], [0, 0, 0]]


def test_the_null_expert_takes_its_share_and_does_nothing() -> None:
    with_null = dense(SCORES, top_k=9, null=3.0)
    assert with_null.shape == SCORES.shape
    e = torch.tensor([4.0, 3.0, 2.0, 1.0, 3.0], dtype=torch.float64).softmax(0)
    assert torch.allclose(with_null[0, :4], e[:4])
    assert dense(SCORES, top_k=2, null=3.5, scale="uniform")[0].tolist() == [0.5, 0, 0, 0, 0]


@pytest.mark.parametrize("scale", ["softmax", "unit", "uniform", "proportional"])
@pytest.mark.parametrize("steps", [{}, {"top_p": 0.5}, {"threshold": 0.0}, {"null": 1.0}])
def test_no_step_hides_a_score_that_is_not_a_number(scale: Any, steps: dict[str, Any]) -> None:
    scores = torch.tensor([[float("nan"), 1.0, 2.0], [0.5, 1.0, 2.0]])
    weights = dense(scores, top_k=2, scale=scale, **steps)
    assert bool(weights[0].isnan().any())
    assert not bool(weights[1].isnan().any())


@pytest.mark.parametrize("scale", ["softmax", "unit", "uniform", "proportional"])
@pytest.mark.parametrize("steps", [{}, {"top_p": 0.5}, {"top_k": 1}])
def test_no_step_chooses_where_nothing_may_be_chosen(scale: Any, steps: dict[str, Any]) -> None:
    assert dense(torch.full((2, 3), -torch.inf), scale=scale, **steps).tolist() == [[0, 0, 0]] * 2


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1"),
        ({"threshold": float("nan")}, "threshold must be a finite number"),
        ({"null": float("inf")}, "null must be a finite number"),
        ({"null": True}, "null must be a finite number"),
        ({"scale": "mean"}, "scale must be one of"),
        ({"null": 1.0, "threshold": 2.0}, "null must not lie below threshold"),
    ],
)
def test_steps_that_make_no_sense_are_refused(steps: dict[str, Any], message: str) -> None:
    choice = Choice()
    for key, value in steps.items():
        # Behind the type checker of the tests, which refuses some of these first.
        object.__setattr__(choice, key, value)
    with pytest.raises(UsageError, match=message):
        choice.__post_init__()


@pytest.mark.parametrize("how", ["none", "unit", "layer"])
def test_products_are_normalised_as_if_their_inputs_had_been(how: Any, generator: torch.Generator) -> None:
    x = torch.randn(5, 8, generator=generator, dtype=torch.float64) * 7 + 3
    matrix = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    found = normalise_products(x @ matrix.mT, x, matrix.sum(dim=1), how)
    assert torch.allclose(found, normalise(x, how) @ matrix.mT, rtol=1e-12, atol=1e-12)


def test_normalised_inputs_have_unit_norm_or_unit_deviation(generator: torch.Generator) -> None:
    x = torch.cat([torch.randn(3, 8, generator=generator) * 9 + 2, torch.zeros(1, 8)])
    assert torch.allclose(normalise(x, "unit").norm(dim=1), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    layer = normalise(x, "layer")
    assert torch.allclose(layer.mean(dim=1), torch.zeros(4), atol=1e-6)
    assert torch.allclose(layer.std(dim=1, correction=0), torch.tensor([1.0, 1.0, 1.0, 0.0]), atol=1e-4)
