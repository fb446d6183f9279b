"""The small space that the updates of one layer share, in which they are small dense matrices."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.adapter import LoraFactors
from lorary.merge.layers import MixedLayer


class CoreSpace(NamedTuple):
    """Updates of one layer as `outputs @ cores[e] @ inputsᵀ`, all float64.

    `outputs` is (d_out, p) and `inputs` (d_in, q), both with orthonormal columns, `cores` is (experts, p, q). p and q
    are the sum of the ranks, or the size of the layer where that is smaller.
    """

    outputs: Tensor
    inputs: Tensor
    cores: Tensor


def core_space(layer: MixedLayer) -> CoreSpace:
    """The bases that span the outputs and the inputs of all updates, and the updates in them, exactly.

    Core space merging (2509.17786) takes its bases from the SVD of the stacked factors. Here they are the left and
    right singular vectors of the stacked updates, which are the same subspaces and do not depend on how an update is
    split into factors. Sums and singular values are those of the full updates; what works entry by entry, as TIES
    does, depends on the choice of the bases.

    Args:
        layer: the factors; the scaling of each counts.
    """
    lora_a, lora_b = layer.concatenated()
    q_in, r_in = torch.linalg.qr(lora_a.double().mT)
    q_out, r_out = torch.linalg.qr(lora_b.double() * layer.scaling)
    ranks = [factors.rank for factors in layer.factors]
    pairs = zip(r_out.split(ranks, dim=1), r_in.split(ranks, dim=1), strict=True)
    cores = torch.stack([up @ down.mT for up, down in pairs])
    out_basis = _directions(torch.einsum("epq,erq->pr", cores, cores))
    in_basis = _directions(torch.einsum("epq,epr->qr", cores, cores))
    return CoreSpace(q_out @ out_basis, q_in @ in_basis, out_basis.mT @ cores @ in_basis)


def factors_of_core(core: Float[Tensor, "p q"], space: CoreSpace) -> LoraFactors:
    """A matrix of a core space as factors of scaling 1, float64, of rank min(p, q)."""
    if core.shape[0] < core.shape[1]:
        return LoraFactors(core @ space.inputs.mT, space.outputs, 1.0)
    return LoraFactors(space.inputs.mT, space.outputs @ core, 1.0)


def _directions(gram: Tensor) -> Tensor:
    """Eigenvectors by descending eigenvalue, one per column."""
    return torch.linalg.eigh(gram).eigenvectors.flip(1)
