"""The spectrum's edges; its mathematics stands in tests/property/test_spectrum.py."""

import pytest
import torch

from lorary.errors import ShapeError
from lorary.ops.spectrum import low_rank_spectrum


def test_stacks_that_share_no_rank_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"must share batch and rank\nfound: \(2, 3, 5\) and \(2, 5, 4\)"):
        # Behind the shape checker of the tests, which refuses this before the function runs.
        low_rank_spectrum.__wrapped__(torch.ones(2, 3, 5), torch.ones(2, 5, 4))  # type: ignore[attr-defined]


def test_a_zero_update_has_zero_values_and_orthonormal_directions() -> None:
    values, directions = low_rank_spectrum(torch.ones(2, 5), torch.zeros(4, 2))
    assert values.tolist() == [0, 0]
    assert torch.allclose(directions @ directions.mT, torch.eye(2, dtype=torch.float64))


def test_half_precision_factors_are_decomposed_in_float64(generator: torch.Generator) -> None:
    lora_a = torch.randn(3, 8, generator=generator).bfloat16()
    lora_b = torch.randn(6, 3, generator=generator).bfloat16()
    values = low_rank_spectrum(lora_a, lora_b).values
    assert values.dtype == torch.float64
    assert torch.allclose(values, torch.linalg.svdvals(lora_b.double() @ lora_a.double())[:3], rtol=1e-12)
