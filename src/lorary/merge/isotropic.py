"""Isotropic merging: the summed update gets singular values that are all equal (2502.04959)."""

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.merge.tsv import orthogonal
from lorary.ops.spectrum import RELATIVE_ZERO


def iso_c(cores: Float[Tensor, "experts p q"], weights: Float[Tensor, " experts"]) -> Float[Tensor, "p q"]:
    """Iso-C: the weighted sum with each singular value replaced by their mean.

    The mean is over the singular values that the sum has, not over the zeros of a full matrix.

    Args:
        cores: of the experts in a common space, float64.
        weights: of the experts.
    """
    left, values, right = _svd(torch.tensordot(weights, cores, dims=1))
    return values.mean() * left @ right if len(values) else left @ right


def iso_cts(
    cores: Float[Tensor, "experts p q"], weights: Float[Tensor, " experts"], *, common: float
) -> Float[Tensor, "p q"]:
    """Iso-CTS: the directions of the sum that are least used are replaced by directions of single experts.

    Of the r directions of the sum the first `common` share stays. The others are shared out equally: each expert gives
    the first directions of what is left of its update outside of the common outputs. All are then made orthogonal, and
    all singular values equal to their mean.

    Args:
        cores: of the experts in a common space, float64.
        weights: of the experts.
        common: share of the directions of the sum that stays, from 0 to 1.
    """
    left, values, right = _svd(torch.tensordot(weights, cores, dims=1))
    num_own = int((1 - common) * len(values)) // len(cores)
    num_common = len(values) - num_own * len(cores)
    shared = left[:, :num_common]
    outputs, strengths, inputs = [shared], [values[:num_common]], [right[:num_common]]
    for core, weight in zip(cores, weights, strict=True):
        outside = weight * (core - shared @ (shared.mT @ core))
        own_left, own_values, own_right = _svd(outside)
        outputs.append(own_left[:, :num_own])
        strengths.append(own_values[:num_own])
        inputs.append(own_right[:num_own])
    mean = torch.cat(strengths).mean() if len(values) else 0.0
    return mean * orthogonal(torch.cat(outputs, dim=1)) @ orthogonal(torch.cat(inputs).mT).mT


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular triples that a matrix has, without those of singular value 0."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    is_there = values > RELATIVE_ZERO * values[:1]
    return left[:, is_there], values[is_there], right[is_there]
