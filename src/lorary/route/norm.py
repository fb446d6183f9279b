"""Norm: how much an expert would change the layer's output."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lorary.ops.blocks import Block, block_norms


def norm_readout(
    z: Float[Tensor, "tokens ranks"],
    outputs: Sequence[Block],
    alive: Bool[Tensor, " experts"],
    calibration: Float[Tensor, "experts 2"] | None = None,
) -> Float[Tensor, "tokens experts"]:
    """Score each expert by `‖ΔW x‖`, exactly, or by how unusual that norm is for it.

    `‖B z‖ = ‖R z‖` with the thin QR of B, so that the update's output is never formed. Experts of large updates win
    by loudness; calibrated scores `(‖ΔW x‖ - mean) / deviation` take that away. Source: SEQR, arXiv 2509.18093.

    Args:
        z: the low-rank buffer of a layer.
        outputs: for each expert the triangular factor R of its lora_b, scaling folded in.
        alive: whether each expert may be chosen.
        calibration: mean and deviation of each expert's own norm on its own data, deviations above 0.

    Returns:
        Scores, minus infinity for experts that are not alive.
    """
    scores = block_norms(z, outputs, len(alive))
    if calibration is not None:
        scores = (scores - calibration[:, 0]) / calibration[:, 1]
    return scores.masked_fill(~alive, -torch.inf)
