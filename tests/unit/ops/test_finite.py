"""Whether all numbers of a tensor are finite."""

import pytest
import torch

from lorary.ops.finite import is_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_number_that_is_not_finite_is_seen_wherever_it_lies(dtype: torch.dtype) -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        for place in (0, 37, 99):
            tensor = torch.linspace(-1, 1, 100).to(dtype)
            assert is_finite(tensor)
            tensor[place] = bad
            assert not is_finite(tensor)
            assert not is_finite(tensor.view(10, 10).mT)


def test_what_is_empty_or_nothing_but_largest_numbers_is_finite() -> None:
    assert is_finite(torch.empty(0, 3))
    assert is_finite(torch.full((3,), torch.finfo(torch.float32).max))
