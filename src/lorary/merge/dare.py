"""DARE: random entries of each update are dropped, and the others are enlarged to make up for them (2311.03099)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.merge.ties import elect_and_average


def dare(
    updates: Float[Tensor, "experts d_out d_in"],
    weights: Float[Tensor, " experts"],
    *,
    density: float,
    generators: Sequence[torch.Generator],
) -> Float[Tensor, "d_out d_in"]:
    """Sum the updates of one layer after random entries of each were dropped.

    Args:
        updates: of the experts, float32 or float64.
        weights: of the experts.
        density: probability to keep an entry; what is kept is divided by it.
        generators: one for each expert, so that the result does not depend on their order.
    """
    return torch.tensordot(weights, drop(updates, density, generators), dims=1)


def dare_ties(
    updates: Float[Tensor, "experts d_out d_in"],
    weights: Float[Tensor, " experts"],
    *,
    density: float,
    generators: Sequence[torch.Generator],
) -> Float[Tensor, "d_out d_in"]:
    """Elect signs and average as TIES does, after random entries were dropped in place of the smallest."""
    return elect_and_average(drop(updates, density, generators) * weights[:, None, None])


def drop(
    updates: Float[Tensor, "experts d_out d_in"], density: float, generators: Sequence[torch.Generator]
) -> Float[Tensor, "experts d_out d_in"]:
    """Keep each entry with a probability, and divide it by that; the generators are those of the CPU."""
    shape = updates.shape[1:]
    kept = torch.stack([torch.rand(shape, generator=generator) < density for generator in generators])
    return updates * kept.to(updates.device) / density
