"""The low-rank update equals its formula, in value and in every gradient."""

import pytest
import torch
from torch import Tensor

from lorary.ops.low_rank import add_low_rank

SPANS = (5, 1, 6)  # tokens of each, over three sequences of four


def inputs(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """output (3, 4, 5), x (3, 4, 6), down (3, 2, 6) and up (3, 2, 5)."""
    shapes = ((3, 4, 5), (3, 4, 6), (3, 2, 6), (3, 2, 5))
    output, x, down, up = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes
    )
    return output, x, down, up


def by_formula(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """The update, span by span."""
    own = x.reshape(-1, 6).split(SPANS)
    return torch.cat([rows @ a.mT @ b for rows, a, b in zip(own, down, up, strict=True)]).view(3, 4, 5)


def test_the_sum_is_that_of_the_formula(generator: torch.Generator) -> None:
    output, x, down, up = inputs(generator)
    assert torch.allclose(add_low_rank(output, x, down, up, SPANS), output + by_formula(x, down, up), atol=1e-12)


def test_every_gradient_is_the_numerical_one(generator: torch.Generator) -> None:
    assert torch.autograd.gradcheck(add_low_rank, (*inputs(generator), SPANS))


def test_factors_that_are_not_contiguous_are_taken_as_they_are(generator: torch.Generator) -> None:
    output, x, down, up = inputs(generator)
    plain = add_low_rank(output, x, down, up, SPANS)
    turned = up.detach().mT.contiguous().mT.requires_grad_()
    found = add_low_rank(output, x, down.detach().mT.contiguous().mT, turned, SPANS)
    assert torch.equal(found, plain)
    found.sum().backward()
    plain.sum().backward()
    assert turned.grad is not None
    assert torch.equal(turned.grad, up.grad)


def test_no_gradient_is_computed_for_an_input_that_wants_none(generator: torch.Generator) -> None:
    output, x, down, up = inputs(generator)
    add_low_rank(output.detach(), x.detach(), down, up, SPANS).sum().backward()
    assert x.grad is None
    assert down.grad is not None


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_beside_a_half_precision_layer_the_update_is_computed_in_the_dtype_of_the_factors(
    generator: torch.Generator, narrow: torch.dtype
) -> None:
    output, x, down, up = inputs(generator)
    low_output, low_x = (t.detach().to(narrow).requires_grad_() for t in (output, x))
    found = add_low_rank(low_output, low_x, down, up, SPANS)
    update = by_formula(low_x.detach().double(), down.detach(), up.detach())
    assert found.dtype == narrow
    assert torch.equal(found, low_output + update.to(narrow))
    found.float().sum().backward()
    assert low_x.grad is not None
    assert low_x.grad.dtype == narrow
    each = (up.sum(-1, keepdim=True) * down).sum(1)  # what a token of each span gets
    wanted = each.repeat_interleave(torch.tensor(SPANS), 0)
    assert torch.allclose(low_x.grad.double(), wanted.view(3, 4, 6), rtol=1e-2)
    assert down.grad is not None
    assert down.grad.dtype == torch.float64
