"""Products with one small matrix per expert, for experts of any ranks, without a loop over experts."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Block(NamedTuple):
    """The experts of one rank in a layer.

    Args:
        experts: (n,) int64, their positions in the layer.
        columns: (n, rank) int64, their columns of the low-rank buffer.
        matrices: (n, rows, rank), one small matrix each.
    """

    experts: Tensor
    columns: Tensor
    matrices: Tensor


def split_blocks(ranks: Sequence[int], stacked: Float[Tensor, "ranks width"]) -> list[Block]:
    """Blocks of equal rank from matrices that are stacked as the ranks are.

    Args:
        ranks: rank of each expert, in the order of the layer.
        stacked: the (rank, rank) matrix of each expert, one below the other, filled up with zeros on the right.

    Returns:
        One block for each rank that occurs.
    """
    sizes = torch.tensor(list(ranks))
    starts = sizes.cumsum(0) - sizes
    blocks = []
    for rank in sizes.unique().tolist():
        experts = (sizes == rank).nonzero().squeeze(1)
        columns = (starts[experts][:, None] + torch.arange(rank)).to(stacked.device)
        blocks.append(Block(experts.to(stacked.device), columns, stacked[columns][..., :rank]))
    return blocks


def block_norms(
    z: Float[Tensor, "tokens ranks"], blocks: Sequence[Block], num_experts: int
) -> Float[Tensor, "tokens experts"]:
    """`‖M_e z_e‖` for each token and expert.

    Args:
        z: the low-rank buffer.
        blocks: the matrices.
        num_experts: of the layer.

    Returns:
        Norms in the dtype of `z`.
    """
    norms = z.new_zeros(z.shape[0], num_experts)
    for block in blocks:
        products = z[:, block.columns].transpose(0, 1) @ block.matrices.mT  # (n, tokens, rows)
        lengths = torch.linalg.vector_norm(products, dim=-1)  # (n, tokens)
        norms = norms.index_copy(1, block.experts, lengths.mT)
    return norms
