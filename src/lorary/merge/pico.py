"""Shrinking output directions that many experts share, in the manner of Pico (2604.16826)."""

import torch
from jaxtyping import Float
from torch import Tensor


def pico(
    cores: Float[Tensor, "experts p q"], weights: Float[Tensor, " experts"], *, strength: float
) -> Float[Tensor, "p q"]:
    """The weighted sum with crowded output directions shrunk, brought back to the norm that it had.

    LoRAs of different tasks write into a few output directions in common, which a sum overstates. For each principal
    output direction of all updates, the number of experts that use it is the participation number of their shares of
    energy there, from 1 to the number of experts. The direction is divided by that number to the power `strength`: with
    1, a direction of all experts is averaged where one of a single expert is summed.

    The idea is the paper's: calibrate outputs before the merge, rescale afterwards. How sharing is measured, and the
    norm that is restored, are choices made here.

    Args:
        cores: of the experts in a common space, float64.
        weights: of the experts.
        strength: 0 leaves the sum as it is.
    """
    total = torch.tensordot(weights, cores, dims=1)
    energies = cores.square().sum((1, 2), keepdim=True)
    # Each expert counts alike, however large its update is.
    normalised = cores / torch.where(energies > 0, energies, 1.0).sqrt()
    directions = torch.linalg.eigh(torch.einsum("epq,erq->pr", normalised, normalised)).eigenvectors  # (p, directions)
    shares = (directions.mT @ normalised).square().sum(2)  # (experts, directions)
    squares = shares.square().sum(0)
    num_users = torch.where(squares > 0, shares.sum(0).square() / torch.where(squares > 0, squares, 1.0), 1.0)
    shrunk = directions * num_users**-strength @ (directions.mT @ total)
    norm = shrunk.norm()
    return shrunk * (total.norm() / norm) if norm > 0 else shrunk
