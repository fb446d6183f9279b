"""Normalising what a router scores, in the low-rank space where its products already are."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

InputNorm = Literal["none", "unit", "layer"]
LAYER_EPSILON = 1e-5


def normalise(x: Float[Tensor, "tokens d_in"], how: InputNorm) -> Float[Tensor, "tokens d_in"]:
    """Hidden states at a common scale: scores then compare tokens and layers, and a temperature means one thing.

    Args:
        x: hidden states entering a routed layer.
        how: `none`; `unit`: divided by their Euclidean norm; `layer`: mean 0 and deviation 1 over the features.

    Returns:
        Of the shape and dtype of `x`; a zero stays zero.
    """
    if how == "none":
        return x
    if how == "unit":
        return x / _norms(x)
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=LAYER_EPSILON)


def normalise_products(
    products: Float[Tensor, "tokens rows"],
    x: Float[Tensor, "tokens d_in"],
    row_sums: Float[Tensor, " rows"],
    how: InputNorm,
) -> Float[Tensor, "tokens rows"]:
    """What `normalise(x, how) @ matrixᵀ` is, from `x @ matrixᵀ`, which a layer needs for mixing anyway.

    Args:
        products: x @ matrixᵀ.
        x: hidden states, as they are.
        row_sums: the sum of each row of the matrix.
        how: as for `normalise`.

    Returns:
        The products of the normalised hidden states.
    """
    if how == "none":
        return products
    if how == "unit":
        return products / _norms(x)
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
    return (products - mean * row_sums) * torch.rsqrt(variance + LAYER_EPSILON)


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
