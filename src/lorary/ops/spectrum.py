"""Singular values and input directions of a low-rank update, without ever forming the update."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.errors import ShapeError

# A singular value this much below the first one counts as none.
RELATIVE_ZERO = 1e-6


class Spectrum(NamedTuple):
    """Singular values, descending, and the right singular vectors that belong to them, one per row.

    `values` is (*batch, k) and `directions` is (*batch, k, d_in) with k = min(rank, d_in, d_out); both are float64.
    Directions that belong to a singular value of zero are an arbitrary orthonormal completion.
    """

    values: Tensor
    directions: Tensor


def low_rank_spectrum(
    lora_a: Float[Tensor, "*batch rank d_in"], lora_b: Float[Tensor, "*batch d_out rank"]
) -> Spectrum:
    """Decompose `lora_b @ lora_a` through thin QR factors and the SVD of their rank x rank core.

    The full (d_out, d_in) matrix never exists: with `lora_aᵀ = Qa Ra` and `lora_b = Qb Rb` the core is `Rb Raᵀ`, and
    its right singular vectors, turned by Qa, are those of the update. Everything runs in float64, since the direction
    of a narrow gap is off by 1e-5 in float32. Source: PAPER 2405.11157, Arrow prototypes; the decomposition is exact
    for any rank, also where the rank exceeds d_in or d_out.

    Args:
        lora_a: down-projections, any float dtype.
        lora_b: up-projections, any float dtype.

    Returns:
        The spectrum in float64. The sign of each direction is fixed: its entry of largest magnitude is positive.

    Raises:
        ShapeError: if the two stacks differ in batch axes or in rank.
    """
    _check_stacks(lora_a, lora_b)
    cores = low_rank_cores(lora_a, lora_b)
    return Spectrum(cores.values, cores.directions)


class Cores(NamedTuple):
    """A spectrum, and two small matrices per update that read it from `z = lora_a x` alone, all float64.

    `row_space` is (*batch, k, rank): `row_space @ z` are the coordinates of x along the directions, exactly
    `directions @ x`, with zero rows for directions that the update does not have. `outputs` is (*batch, k', rank), with
    k' = min(rank, d_out): `outputs @ z` has the norm of the update's output.
    """

    values: Tensor
    directions: Tensor
    row_space: Tensor
    outputs: Tensor


def low_rank_cores(lora_a: Float[Tensor, "*batch rank d_in"], lora_b: Float[Tensor, "*batch d_out rank"]) -> Cores:
    """The spectrum of `low_rank_spectrum`, of the same arguments, and what reads projections and norms from z.

    With `lora_b = Qb Rb` and the core `Rb Raᵀ = Y S Wᵀ`, the direction i is `v_i = (lora_b lora_a)ᵀ u_i / s_i` with
    `u_i = Qb y_i`, so that `v_i . x = y_iᵀ Rb z / s_i`; and `‖lora_b z‖ = ‖Rb z‖`. The signs of directions and of rows
    of `row_space` need not agree; norms do not depend on them.
    """
    _check_stacks(lora_a, lora_b)
    q_a, r_a = torch.linalg.qr(lora_a.double().mT)  # (*batch, d_in, rank'), (*batch, rank', rank)
    r_b = torch.linalg.qr(lora_b.double(), mode="r").R  # (*batch, rank'', rank)
    left, values, right = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    # Below this the direction is rounding: factors are stored in float32 at best.
    is_there = values > RELATIVE_ZERO * values[..., :1]
    inverse = torch.where(is_there, 1 / values, 0.0)
    row_space = inverse[..., None] * (left.mT @ r_b)
    return Cores(values, fix_signs(right @ q_a.mT), row_space, r_b)


def _check_stacks(lora_a: Tensor, lora_b: Tensor) -> None:
    if lora_a.shape[:-2] != lora_b.shape[:-2] or lora_a.shape[-2] != lora_b.shape[-1]:
        raise ShapeError(
            "lora_a (*batch, rank, d_in) and lora_b (*batch, d_out, rank) must share batch and rank",
            found=f"{tuple(lora_a.shape)} and {tuple(lora_b.shape)}",
        )


def fix_signs(vectors: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
    """Flip vectors (rows) so that their entry of largest magnitude is positive; a zero vector stays as it is."""
    largest = vectors.abs().argmax(dim=-1, keepdim=True)
    return torch.where(vectors.gather(-1, largest) < 0, -vectors, vectors)
