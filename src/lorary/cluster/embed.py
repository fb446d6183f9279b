"""The paper's embedding of adapters: flattened factors, sparsified, reduced by a truncated SVD.

Paper: 2405.11157, model-based clustering. The (adapters, numbers) matrix of the recipe never exists here: all that its
SVD and its cosines need are the inner products of the rows, which come from one layer at a time.
"""

from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lorary.adapter import Adapter
from lorary.cluster.spill import Factors, FactorSpill, check_comparable
from lorary.errors import AdapterError
from lorary.ops.gram import row_gram

# What scikit-learn's TruncatedSVD calls n_oversamples and n_iter.
OVERSAMPLES = 10
POWER_ITERATIONS = 5


def flattened_gram(
    adapters: Iterable[Adapter], sparsity: float
) -> tuple[tuple[str, ...], Float[Tensor, "experts experts"]]:
    """Inner products between the sparsified, flattened factors of adapters (steps 1 and 2 of the paper's recipe).

    All A and B of all layers are one vector per adapter, without scalings, as in the paper; the order of the numbers in
    it is without effect on all steps. A layer that an adapter lacks counts as zeros; its quantile is taken over the
    numbers it has. Factors depend on their gauge: the adapters must come from one initial draw.

    Args:
        adapters: at least one; consumed one at a time.
        sparsity: share of the numbers set to zero, in [0, 1).

    Returns:
        The names, and the inner products in float64.

    Raises:
        AdapterError: if two adapters differ in rank or shape at a layer, or nothing is left of one.
        UsageError: if the temporary folder is full.
    """
    names: list[str] = []
    first: dict[str, tuple[str, int]] = {}
    with FactorSpill() as spill:
        for adapter in adapters:
            check_comparable(adapter)
            _check_ranks(adapter, first)
            spill.add(adapter.name, _sparsified(adapter, sparsity))
            names.append(adapter.name)
        gram = torch.zeros(len(names), len(names), dtype=torch.float64)
        for path in spill.paths:
            layer = spill.layer(path)
            rows = torch.tensor(layer.experts)
            for factor in (layer.lora_a, layer.lora_b_t):
                gram[rows[:, None], rows] += row_gram(factor.reshape(len(rows), -1))
    return tuple(names), gram


def embedding_of_gram(
    gram: Float[Tensor, "experts experts"], components: int, seed: int
) -> Float[Tensor, "experts components"]:
    """What scikit-learn's randomised TruncatedSVD would return for the rows behind a Gram matrix, scaled to length one.

    For fewer rows than columns the algorithm draws its start over the rows, and all that it does to the matrix X (power
    iterations, orthonormal basis, SVD of the projection) can be written with G = X Xᵀ: the basis is Xᵀ W C^(-1/2) with
    W = orth(G⁵ draw) and C = Wᵀ G W, and the projected rows are G W C^(-1/2). So the result is the same, its
    approximation included, to rounding.

    Args:
        gram: inner products of the rows, float64.
        components: to keep, at most.
        seed: of the start.

    Returns:
        Unit rows (a zero row stays zero); fewer columns than asked for where there are fewer rows.
    """
    draw = np.random.RandomState(seed).normal(size=(gram.shape[0], components + OVERSAMPLES))
    basis = torch.from_numpy(draw)
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(gram @ basis).Q
    values, vectors = torch.linalg.eigh(basis.mT @ gram @ basis)
    is_independent = values > values.max() * 1e-14  # linearly dependent rows add directions of length zero
    projected = gram @ basis @ (vectors[:, is_independent] / values[is_independent].sqrt())
    left, singular, _ = torch.linalg.svd(projected, full_matrices=False)
    embedding = left[:, :components] * singular[:components]
    return torch.nn.functional.normalize(embedding, dim=1)


def _sparsified(adapter: Adapter, sparsity: float) -> dict[str, Factors]:
    """The factors in float32, magnitudes at or below the quantile set to zero.

    lora_b has the shape of its transpose but not its order: nothing here depends on the order within a factor.
    """
    flat = torch.cat([factor.float().flatten() for _, f in adapter for factor in (f.lora_a, f.lora_b)])
    sizes = flat.abs()
    threshold = float(np.quantile(sizes.numpy(), sparsity))
    mask = ~(sizes <= threshold)  # numbers that are not finite stay, to be refused with the other methods
    if sizes.any() and not mask.any():
        raise AdapterError(
            f"adapter '{adapter.name}' must have numbers beyond the quantile {sparsity} of their magnitudes",
            found=f"all of magnitude {threshold} or less",
            remedy="use the method 'delta'",
        )
    parts = iter(torch.where(mask, flat, 0.0).split([t.numel() for _, f in adapter for t in (f.lora_a, f.lora_b)]))
    return {path: (next(parts).view(f.rank, f.d_in), next(parts).view(f.rank, f.d_out)) for path, f in adapter}


def _check_ranks(adapter: Adapter, first: dict[str, tuple[str, int]]) -> None:
    """Refuse an adapter whose rank at a layer differs from that of the adapters before."""
    for path, factors in adapter:
        first_name, rank = first.setdefault(path, (adapter.name, factors.rank))
        if factors.rank != rank:
            raise AdapterError(
                f"adapters '{first_name}' and '{adapter.name}' must have one rank at layer '{path}' to be flattened",
                found=f"{rank} and {factors.rank}",
                remedy="use the method 'delta', which compares adapters of any ranks",
            )
