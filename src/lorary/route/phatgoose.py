"""PHATGOOSE: each expert has a gate vector, trained on its own data to say for which tokens it helps."""

import torch
from jaxtyping import Float
from torch import Tensor


def gate_score_rows(gates: Float[Tensor, "experts d_in"]) -> Float[Tensor, "experts d_in"]:
    """The rows that a standardised token is multiplied with: standardised gates, divided by the root of d_in.

    Gates of different experts were trained apart from each other, so that their lengths mean nothing: mean 0 and
    deviation 1 over the features make them comparable. Divided by the root, that is the centred gate at length 1.
    Source: PHATGOOSE, arXiv 2402.05859.

    Args:
        gates: trained gate vectors; a zero vector marks an expert without one.

    Returns:
        Rows of length 1 and mean 0; zero where the gate is.
    """
    centred = gates.double() - gates.double().mean(dim=-1, keepdim=True)
    return torch.nn.functional.normalize(centred, dim=-1, eps=torch.finfo(torch.float64).tiny).to(gates.dtype)
