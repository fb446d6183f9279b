"""Projection: how much of a token lies in the input space of an expert's update."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lorary.ops.blocks import Block, block_norms


def projection_readout(
    z: Float[Tensor, "tokens ranks"], row_space: Sequence[Block], alive: Bool[Tensor, " experts"]
) -> Float[Tensor, "tokens experts"]:
    """Score each expert by `‖Vᵀ x‖`, the length of the token within the space spanned by its input directions.

    Read from `z = lora_a x`, which the layer computes anyway. Singular values take no part, and experts of larger rank
    span more and score higher. SpectR as released (arXiv 2504.03454), SMILE (2408.10174).

    Args:
        z: the low-rank buffer of a layer.
        row_space: for each expert the matrix that turns its z into coordinates along its directions.
        alive: whether each expert may be chosen.

    Returns:
        Non-negative scores, minus infinity for experts that are not alive.
    """
    return block_norms(z, row_space, len(alive)).masked_fill(~alive, -torch.inf)
