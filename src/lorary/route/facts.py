"""What the rules know of an expert in one layer, computed once from its weights."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.ops.spectrum import Spectrum, fix_signs, low_rank_cores
from lorary.route.arrow import prototypes_of


class Facts(NamedTuple):
    """Facts of experts of one rank, all float64.

    `prototypes` is (experts, d_in), `gap` (experts,): see `arrow_prototypes`. `row_space` and `outputs` are
    (experts, rank, rank), filled up with zero rows: see `low_rank_cores`.
    """

    prototypes: Tensor
    gap: Tensor
    row_space: Tensor
    outputs: Tensor


def expert_facts(lora_a: Float[Tensor, "experts rank d_in"], lora_b: Float[Tensor, "experts d_out rank"]) -> Facts:
    """All that rules which need weights alone read, from one factorisation.

    Args:
        lora_a: down-projections of experts of one rank, any float dtype.
        lora_b: their up-projections, scalings folded in.

    Returns:
        The facts.
    """
    cores = low_rank_cores(lora_a, lora_b)
    prototypes, gap = prototypes_of(Spectrum(cores.values, cores.directions))
    rank = lora_a.shape[1]
    return Facts(prototypes, gap, _padded_to(cores.row_space, rank), _padded_to(cores.outputs, rank))


def tied_prototypes(
    lora_a: list[Float[Tensor, "experts _rank d_in"]], outputs: list[Float[Tensor, "experts _rank2 _rank3"]]
) -> Float[Tensor, "experts d_in"]:
    """One prototype for layers that share their input: that of their updates stacked along d_out.

    This is what an adapter of the fused layer would have, and what "concat" means in the paper's code, there for one
    shared lora_a. Only the triangular factors of lora_b are needed: the rest of it turns outputs.

    Args:
        lora_a: of each layer.
        outputs: the triangular factor of each layer's lora_b, see `Facts`.

    Returns:
        Prototypes in float64, zero where all updates are.
    """
    stacked = torch.cat(lora_a, dim=1)
    joint = stacked.new_zeros(len(stacked), stacked.shape[1], stacked.shape[1])
    start = 0
    for matrices in outputs:
        stop = start + matrices.shape[2]
        joint[:, start:stop, start:stop] = matrices
        start = stop
    return expert_facts(stacked, joint).prototypes


def input_directions(lora_a: Float[Tensor, "experts rank d_in"]) -> Float[Tensor, "experts d_in"]:
    """The first right singular vector of lora_a alone: the paper's code knows experts of a zero update by it.

    Returns:
        Unit vectors in float64, the entry of largest magnitude positive; zero where lora_a is.
    """
    directions: Tensor = torch.linalg.svd(lora_a.double(), full_matrices=False).Vh[:, 0]
    return fix_signs(directions) * lora_a.flatten(1).any(dim=1)[:, None]


def _padded_to(matrices: Tensor, rank: int) -> Tensor:
    return torch.nn.functional.pad(matrices, (0, 0, 0, rank - matrices.shape[1]))
