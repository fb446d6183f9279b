"""The best approximation of updates by a smaller rank, and what it leaves out."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.adapter import LoraFactors
from lorary.merge.layers import Modules
from lorary.ops.spectrum import fix_signs


class Truncated(NamedTuple):
    """Factors by path, and what was left out, relative to all, in the Frobenius norm: over all layers and by path."""

    modules: dict[str, LoraFactors]
    error: float
    errors: dict[str, float]


class Closest(NamedTuple):
    """The closest factors of one layer, and the squared Frobenius norms of what was left out and of all."""

    factors: LoraFactors
    lost: float
    total: float


def truncate(modules: Modules, rank: int, scaling: float = 1.0) -> Truncated:
    """Bring every layer to a rank at most; layers of that rank or a smaller one stay as they are.

    A bias beside lora_b stays as it is: it acts on no input. By Eckart and Young no factors of the rank come closer,
    layer by layer. The full update never exists: QR of both factors and the SVD of their core do, in float64. The
    singular values are split evenly between the new factors.

    Args:
        modules: factors by path.
        rank: the largest rank to keep, at least 1.
        scaling: of the new factors, above 0; it decides how they are split, and nothing about the update.

    Returns:
        The factors in the dtypes they had, and the relative errors: 0 where nothing was left out.
    """
    return with_errors({path: _closest(factors, rank, scaling) for path, factors in modules.items()})


def with_errors(layers: dict[str, Closest]) -> Truncated:
    """The factors of all layers, with the relative error of each and of all."""
    lost, total = sum(layer.lost for layer in layers.values()), sum(layer.total for layer in layers.values())
    errors = {path: _relative(layer.lost, layer.total) for path, layer in layers.items()}
    return Truncated({path: layer.factors for path, layer in layers.items()}, _relative(lost, total), errors)


def closest_of_rank(update: Float[Tensor, "d_out d_in"], rank: int) -> Closest:
    """The closest factors of a full update, of scaling 1.

    The singular vectors of the shorter side come from its Gram matrix, which is several times as fast as an SVD. The
    update is projected on them exactly, so that squaring costs no precision in what is kept.

    Args:
        update: float32 or float64; everything runs in float64.
        rank: the largest to keep, at least 1.

    Returns:
        Factors in the dtype of the update.
    """
    matrix = update.double()
    is_wide = matrix.shape[0] <= matrix.shape[1]
    short = matrix if is_wide else matrix.mT
    vectors = torch.linalg.eigh(short @ short.mT).eigenvectors.flip(1)[:, :rank]
    projected = vectors.mT @ short  # (rank, long side): orthogonal rows, whose norms are the singular values
    root = projected.norm(dim=1).sqrt()
    inverse = torch.where(root > 0, 1 / root, 0.0)
    first, second = vectors * root, inverse[:, None] * projected
    lora_a, lora_b = (second, first) if is_wide else (first.mT, second.mT)
    total = float(matrix.square().sum())
    lost = max(0.0, total - float(projected.square().sum())) if len(projected) < len(short) else 0.0
    return Closest(LoraFactors(lora_a.to(update), lora_b.to(update), 1.0), lost, total)


def _closest(factors: LoraFactors, rank: int, scaling: float) -> Closest:
    q_a, r_a = torch.linalg.qr(factors.lora_a.double().mT)
    q_b, r_b = torch.linalg.qr(factors.lora_b.double() * factors.scaling)
    left, values, right = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    total = float(values.square().sum())
    if factors.rank <= rank:
        return Closest(factors, 0.0, total)
    directions = right[:rank] @ q_a.mT
    signed = fix_signs(directions)
    signs = (signed * directions).sum(1, keepdim=True).sign()
    root = (values[:rank] / scaling).sqrt()
    lora_a, lora_b = root[:, None] * signed, (q_b @ left[:, :rank]) * (root * signs[:, 0])
    bias = None if factors.bias is None else factors.bias * (factors.scaling / scaling)
    closest = LoraFactors(lora_a.to(factors.lora_a), lora_b.to(factors.lora_b), scaling, bias)
    return Closest(closest, float(values[rank:].square().sum()), total)


def _relative(lost: float, total: float) -> float:
    return (lost / total) ** 0.5 if total else 0.0
