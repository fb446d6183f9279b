"""Magnitude pruning: each update keeps its largest entries, and the rest of it is dropped before updates are summed."""

import torch
from jaxtyping import Float
from torch import Tensor


def prune(
    updates: Float[Tensor, "experts d_out d_in"], weights: Float[Tensor, " experts"], *, density: float
) -> Float[Tensor, "d_out d_in"]:
    """Sum the largest entries of the updates of one layer; PEFT's `magnitude_prune`, on updates.

    Args:
        updates: of the experts, float32 or float64.
        weights: of the experts.
        density: share of each update to keep.
    """
    return torch.tensordot(weights, keep_largest(updates, density), dims=1)


def keep_largest(entries: Float[Tensor, "experts *entries"], density: float) -> Float[Tensor, "experts *entries"]:
    """Set all but the largest magnitudes of each expert to 0.

    Args:
        entries: of each expert.
        density: share to keep; at least one entry is kept.
    """
    flat = entries.flatten(1)
    num_kept = max(1, round(density * flat.shape[1]))
    if num_kept == flat.shape[1]:
        return entries
    kept = flat.abs().topk(num_kept, dim=1, sorted=False).indices
    return torch.zeros_like(flat).scatter_(1, kept, flat.gather(1, kept)).view(entries.shape)
