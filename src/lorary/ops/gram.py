"""Inner products between low-rank updates, through rank x rank products only."""

import torch
from jaxtyping import Float
from torch import Tensor

# Rows (ranks, or experts) of one block: few, since half of a block on the diagonal is computed in vain, but enough for
# the matrix product to be efficient.
BLOCK_ROWS = 256


def delta_gram(
    lora_a: Float[Tensor, "ranks d_in"],
    lora_b: Float[Tensor, "d_out ranks"],
    expert_of_rank: Tensor,
    num_experts: int,
) -> Float[Tensor, "experts experts"]:
    """Frobenius inner products `<B_i A_i, B_j A_j>` of one layer, for all pairs of experts.

    `<B_i A_i, B_j A_j> = sum((B_iᵀ B_j) * (A_i A_jᵀ))`, so that only (ranks, ranks) products exist, one block of rows
    and the columns from there on at a time. The result does not depend on the gauge of the factors.

    Args:
        lora_a: rank-concatenated down-projections, float32 or float64: the products are taken in this dtype.
        lora_b: rank-concatenated up-projections, scalings folded in.
        expert_of_rank: (ranks,) int64, the expert that each rank belongs to, ascending.
        num_experts: number of experts, more than `expert_of_rank` holds where some lack the layer.

    Returns:
        The symmetric matrix in float64; rows of experts that lack the layer are zero.
    """
    within = lora_a.new_zeros(num_experts, num_experts)  # blocks on the diagonal, which hold both (i, j) and (j, i)
    beyond = lora_a.new_zeros(num_experts, num_experts)  # blocks right of it, of which the mirror image is left out
    for start in range(0, len(lora_a), BLOCK_ROWS):
        experts = expert_of_rank[start : start + BLOCK_ROWS]
        stop, first, last = start + len(experts), int(experts[0]), int(experts[-1]) + 1
        product = lora_a[start:stop] @ lora_a[start:].mT
        product *= lora_b[:, start:stop].mT @ lora_b[:, start:]
        rows = product.new_zeros(last - first, product.shape[1]).index_add_(0, experts - first, product)
        within[first:last].index_add_(1, experts, rows[:, : stop - start])
        beyond[first:last].index_add_(1, expert_of_rank[stop:], rows[:, stop - start :])
    gram = (within + beyond + beyond.mT).double()
    return (gram + gram.mT) / 2  # symmetric to the last bit, which sums in another order are not


def row_gram(rows: Float[Tensor, "experts features"]) -> Float[Tensor, "experts experts"]:
    """Inner products of the rows of a matrix, each pair once.

    Args:
        rows: float32 or float64: the products are taken in this dtype.

    Returns:
        The symmetric matrix in float64.
    """
    gram = rows.new_zeros(len(rows), len(rows))
    for start in range(0, len(rows), BLOCK_ROWS):
        gram[start : start + BLOCK_ROWS, start:] = rows[start : start + BLOCK_ROWS] @ rows[start:].mT
    return (gram.triu() + gram.triu(1).mT).double()


def cosine_of_gram(gram: Float[Tensor, "experts experts"]) -> Float[Tensor, "experts experts"]:
    """Cosines from inner products.

    Args:
        gram: symmetric, any float dtype.

    Returns:
        The cosines, in [-1, 1], in the dtype of `gram`; ones on the diagonal, zeros beside a norm of zero.
    """
    norms = gram.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    # The outer product first: it is symmetric to the last bit.
    return (inverse[:, None] * inverse).mul_(gram).clamp_(-1.0, 1.0).fill_diagonal_(1.0)
