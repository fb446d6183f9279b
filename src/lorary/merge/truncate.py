"""The best approximation of updates by a smaller rank, and what it leaves out."""

from typing import NamedTuple

import torch

from lorary.adapter import LoraFactors
from lorary.merge.layers import Modules
from lorary.ops.spectrum import fix_signs


class Truncated(NamedTuple):
    """Factors by path, and the error: what was left out, relative to all, in the Frobenius norm over all layers."""

    modules: dict[str, LoraFactors]
    error: float


def truncate(modules: Modules, rank: int, scaling: float = 1.0) -> Truncated:
    """Bring every layer to a rank at most; layers of that rank or a smaller one stay as they are.

    By Eckart and Young no factors of the rank come closer, layer by layer. The full update never exists: QR of both
    factors and the SVD of their core do, in float64. The singular values are split evenly between the new factors.

    Args:
        modules: factors by path.
        rank: the largest rank to keep, at least 1.
        scaling: of the new factors, above 0; it decides how they are split, and nothing about the update.

    Returns:
        The factors in the dtypes they had, and the relative error: 0 where nothing was left out.
    """
    truncated, lost, total = {}, 0.0, 0.0
    for path, factors in modules.items():
        q_a, r_a = torch.linalg.qr(factors.lora_a.double().mT)
        q_b, r_b = torch.linalg.qr(factors.lora_b.double() * factors.scaling)
        left, values, right = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
        total += float(values.square().sum())
        if factors.rank <= rank:
            truncated[path] = factors
            continue
        lost += float(values[rank:].square().sum())
        directions = right[:rank] @ q_a.mT
        signed = fix_signs(directions)
        signs = (signed * directions).sum(1, keepdim=True).sign()
        root = (values[:rank] / scaling).sqrt()
        lora_a, lora_b = root[:, None] * signed, (q_b @ left[:, :rank]) * (root * signs[:, 0])
        truncated[path] = LoraFactors(lora_a.to(factors.lora_a), lora_b.to(factors.lora_b), scaling)
    return Truncated(truncated, (lost / total) ** 0.5 if total else 0.0)
