"""Arrow's prototypes and scores: zero updates, ambiguous ones, and both ways to the same score."""

import pytest
import torch

from lorary.errors import ShapeError
from lorary.route.arrow import AMBIGUOUS_GAP, arrow_prototypes, arrow_readout, arrow_scores


def test_the_prototype_of_a_rank_one_update_is_its_input_direction() -> None:
    lora_a = torch.tensor([[[3.0, 0.0, -4.0]]])
    prototypes, ratio = arrow_prototypes(lora_a, torch.ones(1, 2, 1))
    assert torch.allclose(prototypes, torch.tensor([[-0.6, 0.0, 0.8]], dtype=torch.float64))
    assert ratio.tolist() == [0]


@pytest.mark.parametrize("size", [0.0, 1e-30])
def test_an_update_too_small_for_float32_has_no_prototype(size: float, generator: torch.Generator) -> None:
    lora_a = torch.randn(2, 3, 8, generator=generator) * torch.tensor([1.0, size])[:, None, None]
    lora_b = torch.randn(2, 8, 3, generator=generator) * torch.tensor([1.0, size])[:, None, None]
    prototypes, ratio = arrow_prototypes(lora_a, lora_b)
    assert prototypes[0].norm() == pytest.approx(1)
    assert prototypes[1].tolist() == [0] * 8
    assert ratio[1] == 0


def test_equal_singular_values_are_reported_as_ambiguous() -> None:
    _, ratio = arrow_prototypes(torch.eye(2, 6)[None], torch.eye(5, 2)[None])
    assert ratio[0] > AMBIGUOUS_GAP


def test_scores_are_absolute_projections_and_dead_experts_are_out_of_reach() -> None:
    prototypes = torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.0, 0.0]])
    scores = arrow_scores(torch.tensor([[-2.0, 3.0]]), prototypes)
    assert scores.tolist() == [[2, 3, -torch.inf]]
    projections = torch.tensor([[-2.0, -3.0, 0.0]])
    assert torch.equal(arrow_readout(projections, torch.tensor([True, True, False])), scores)


def test_half_precision_tokens_are_scored_in_the_dtype_of_the_prototypes(generator: torch.Generator) -> None:
    x, prototypes = torch.randn(4, 8, generator=generator).bfloat16(), torch.randn(3, 8, generator=generator)
    scores = arrow_scores(x, prototypes)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, arrow_scores(x.float(), prototypes))


def test_tokens_and_prototypes_of_other_widths_are_refused() -> None:
    with pytest.raises(ShapeError, match="must share d_in\nfound: 4 and 5"):
        # Behind the shape checker of the tests, which refuses this before the function runs.
        arrow_scores.__wrapped__(torch.ones(2, 4), torch.ones(3, 5))  # type: ignore[attr-defined]
