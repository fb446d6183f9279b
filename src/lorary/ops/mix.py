"""Weighing the experts of a layer: all of them through the low-rank buffer, or the chosen ones of each token alone."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lorary.ops.choose import Chosen

Mix = Literal["outputs", "factors"]


def weigh(
    z: Float[Tensor, "tokens ranks"], by_rank: Float[Tensor, "#tokens ranks"], num_experts: int, mix: Mix
) -> Float[Tensor, "tokens ranks"]:
    """Weigh the low-rank buffer so that expanding it gives the mixture.

    Outputs: `sum_e w_e B_e A_e x`. Factors: `(sum_e w_e B_e) (sum_f w_f A_f) x`, for experts of one rank: the buffer
    becomes w_e times the mean of all experts' z, since `sum_f w_f A_f x` is what every B_e is applied to.

    Args:
        z: down-projections of the tokens.
        by_rank: the weight of the expert that each rank belongs to.
        num_experts: that z holds, for `factors`.
        mix: how.

    Returns:
        What goes through the up-projections.
    """
    weighted = z * by_rank
    if mix == "outputs":
        return weighted
    mean = weighted.view(z.shape[0], num_experts, -1).sum(dim=1)  # (tokens, rank)
    return by_rank * mean.repeat(1, num_experts)


def mix_chosen(
    x: Float[Tensor, "tokens d_in"],
    chosen: Chosen,
    down: Float[Tensor, "_rows d_in"],
    up: Float[Tensor, "ranks d_out"],
    rows: Int[Tensor, "experts widest"],
) -> Float[Tensor, "tokens d_out"]:
    """Apply the chosen experts of each token: their rows are gathered, all others are not read.

    It pays for few tokens, where it reads less than the factors of all experts. `lorary.ops.native` does it for many.

    Args:
        x: tokens.
        chosen: their experts.
        down: rank-concatenated lora_a, and more rows behind.
        up: rank-concatenated lora_b, transposed, scalings folded in.
        rows: the ranks of each expert, -1 behind its last where others have more.

    Returns:
        `sum_e w_e B_e A_e x`.
    """
    picked = rows[chosen.experts]  # (tokens, k, widest)
    weights = torch.where(picked < 0, 0.0, chosen.weights[..., None]).flatten(1)
    picked = picked.clamp_min(0).flatten(1)
    z = (down[picked] @ x[..., None]).squeeze(-1) * weights  # (tokens, k * widest)
    return (z[:, None] @ up[picked]).squeeze(1)
