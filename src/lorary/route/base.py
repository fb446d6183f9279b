"""Base: no expert at all."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def base_weights(experts: Sequence[str]) -> Float[Tensor, " experts"]:
    """Zero for each expert: the bare base model.

    Args:
        experts: names of all experts of the library.

    Returns:
        Weights in float64.
    """
    return torch.zeros(len(experts), dtype=torch.float64)
