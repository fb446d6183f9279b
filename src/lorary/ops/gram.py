"""Inner products between low-rank updates, through rank x rank products only."""

import torch
from jaxtyping import Float
from torch import Tensor


def delta_gram(
    lora_a: Float[Tensor, "ranks d_in"],
    lora_b: Float[Tensor, "d_out ranks"],
    expert_of_rank: Tensor,
    num_experts: int,
) -> Float[Tensor, "experts experts"]:
    """Frobenius inner products `<B_i A_i, B_j A_j>` of one layer, for all pairs of experts.

    `<B_i A_i, B_j A_j> = sum((B_iᵀ B_j) * (A_i A_jᵀ))`, so that only (ranks, ranks) matrices exist. The result does not
    depend on the gauge of the factors.

    Args:
        lora_a: rank-concatenated down-projections.
        lora_b: rank-concatenated up-projections, scalings folded in.
        expert_of_rank: (ranks,) int64, the expert that each rank belongs to.
        num_experts: number of experts, more than `expert_of_rank` holds where some lack the layer.

    Returns:
        The symmetric matrix in float64; rows of experts that lack the layer are zero.
    """
    product = (lora_b.double().mT @ lora_b.double()) * (lora_a.double() @ lora_a.double().mT)
    member = torch.nn.functional.one_hot(expert_of_rank, num_experts).double()  # (ranks, experts)
    gram = member.mT @ product @ member
    return (gram + gram.mT) / 2  # symmetric to the last bit, which sums in another order are not
