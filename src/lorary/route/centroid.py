"""Centroid (CM): each expert is known by the mean hidden state of its own data, layer by layer."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def centroid_score_rows(means: Float[Tensor, "experts d_in"]) -> Float[Tensor, "experts d_in"]:
    """The rows that a token is multiplied with: unit centroids, divided by the root of d_in.

    The root is a temperature that the paper's code has in every layer; folded in here, so that the temperature of a
    setting comes on top. Paper: 2405.11157, centroid matching.

    Args:
        means: mean hidden state of each expert's own data.

    Returns:
        Rows of length 1 / sqrt(d_in); zero where the mean is.
    """
    return torch.nn.functional.normalize(means, dim=-1) / means.shape[-1] ** 0.5


def product_readout(
    projections: Float[Tensor, "*tokens experts"], alive: Bool[Tensor, " experts"]
) -> Float[Tensor, "*tokens experts"]:
    """Score each expert by the product of the token with its row; unlike Arrow's, the sign counts.

    Args:
        projections: products of each token with the rows of `centroid_score_rows`, or of each standardised token with
            those of `lorary.route.phatgoose.gate_score_rows`.
        alive: whether each expert may be chosen.

    Returns:
        Scores of either sign, minus infinity for experts that are not alive.
    """
    return projections.masked_fill(~alive, -torch.inf)
