"""Uniform (mu): every expert of the library, everywhere, with the same weight."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def uniform_weights(experts: Sequence[str]) -> Float[Tensor, " experts"]:
    """1 / E for each of the E experts.

    Experts that do nothing in a layer, or lack it, keep their share there: the result is the mean of all updates,
    whether a zero update is stored or left out. Paper: 2405.11157, the mu baseline.

    Args:
        experts: names of all experts of the library.

    Returns:
        Weights in float64.
    """
    return torch.full((len(experts),), 1.0 / len(experts), dtype=torch.float64)
