"""TSV-Merge: singular vectors of the tasks are made orthogonal to each other before they are summed (2412.00081)."""

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.ops.spectrum import RELATIVE_ZERO


def tsv(cores: Float[Tensor, "experts p q"], weights: Float[Tensor, " experts"]) -> Float[Tensor, "p q"]:
    """Merge the cores of one layer with the singular vectors of all experts decorrelated.

    The singular vectors of all experts stand side by side in two matrices, which are replaced by the closest ones with
    orthonormal columns. Where the experts' directions are orthogonal already, this is their sum. Where they overlap,
    the overlap counts once. The paper keeps an equal share of the layer's directions for each task; factors of LoRA
    have so few that all are kept while they fit.

    Args:
        cores: of the experts in a common space, float64.
        weights: scale the experts' singular values.
    """
    left, values, right = torch.linalg.svd(cores, full_matrices=False)
    size = min(cores.shape[1:])
    is_there = values > RELATIVE_ZERO * values[:, :1]
    if int(is_there.sum()) > size:
        is_there[:, max(1, size // len(cores)) :] = False
    signed = (values * weights[:, None])[is_there]
    return orthogonal(left.mT[is_there].mT) * signed @ orthogonal(right[is_there].mT).mT


def orthogonal(vectors: Float[Tensor, "size columns"]) -> Float[Tensor, "size columns"]:
    """The closest matrix with orthonormal columns, by the polar decomposition.

    Where columns depend on each other, it is orthonormal on what they span: equal columns stay equal and share their
    direction, instead of getting arbitrary ones.
    """
    left, values, right = torch.linalg.svd(vectors, full_matrices=False)
    is_there = values > RELATIVE_ZERO * values[:1]
    return left[:, is_there] @ right[is_there]
