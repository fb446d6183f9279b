"""Contrast: how far above its usual score an expert is, where the usual is what it scores on everybody's prompts."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lorary.ops.blocks import Block
from lorary.route.projection import projection_readout


def contrast_readout(
    z: Float[Tensor, "tokens ranks"],
    row_space: Sequence[Block],
    alive: Bool[Tensor, " experts"],
    moments: Float[Tensor, "experts 2"],
) -> Float[Tensor, "tokens experts"]:
    """Projection's scores, less each expert's mean over the pooled prompts of all experts, by its deviation there.

    Some experts score high on anything, and projection alone would hand them every request. Meant to be averaged over
    the tokens and layers of a request: the mean of such scores is that of the request's own mean score.

    Args:
        z: the low-rank buffer of a layer, of unit inputs.
        row_space: for each expert the matrix that turns its z into coordinates along its directions.
        alive: whether each expert may be chosen.
        moments: mean and deviation of each expert's mean score over a prompt, over the pooled prompts; deviations
            above 0.

    Returns:
        Scores of either sign, minus infinity for experts that are not alive.
    """
    scores = (projection_readout(z, row_space, alive) - moments[:, 0]) / moments[:, 1]
    return scores.masked_fill(~alive, -torch.inf)
