"""Does similarity go with transfer? Mantel's test, for `premise.py`."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lorary.errors import ShapeError, UsageError

# Permutations evaluated at a time: some ten MiB for fifty tasks.
BLOCK = 256


class Mantel(NamedTuple):
    """Rank correlation of two matrices with its one-sided p-value."""

    rho: float
    p: float


def mantel(
    similarity: Tensor,
    transfer: Tensor,
    strata: Sequence[object] | None = None,
    permutations: int = 10_000,
    seed: int = 42,
    *,
    within: bool = False,
) -> Mantel:
    """Does similarity go with transfer? Spearman's rho over ordered pairs of tasks, tested by permuting the tasks.

    Pairs that share a task are not independent, so the p-value comes from exchanging whole tasks: rows and columns of
    `similarity` together. Transfer need not be symmetric; the diagonal is left out of both.

    With `strata` (the family of each task) the question becomes: beyond the family? Then rho is the partial rank
    correlation with "same family" held constant: the correlation of what a linear fit on that indicator leaves of both
    matrices' ranks, computed anew for every permutation. With `within`, tasks are moreover exchanged only within their
    family: that keeps the family structure of both matrices, also where families differ in their mean, and asks whether
    similarity tells more than it. Tasks alone in their family then stay where they are.

    Args:
        similarity: (tasks, tasks), of the tasks' adapters.
        transfer: (tasks, tasks), entry (i, j) tells how well the adapter of i serves task j.
        strata: family of each task.
        permutations: number of random permutations.
        seed: of the permutations.
        within: exchange tasks within their family only.

    Returns:
        rho, and the share of permutations (the identity among them) with a rho at least as large.

    Raises:
        ShapeError: if the matrices or the strata disagree in the number of tasks.
        UsageError: if a value is not finite, or there are fewer than three tasks, or `within` comes without strata.
    """
    _check_matrices(similarity, transfer, strata, within)
    first, second = _ranks(similarity), _ranks(transfer)
    same = None if strata is None else _same_stratum(strata)
    observed = _correlations(first, second, same, torch.arange(len(first))[None])[0]
    if torch.isnan(observed):
        raise UsageError(
            "the rank correlation must be defined: both matrices must vary beyond the strata", found="a constant matrix"
        )
    reached = 1  # the identity
    for orders in _orders(len(first), strata if within else None, permutations, seed):
        # Equal rhos may differ in the last bits: a tie must count, or p comes out too small.
        reached += int((_correlations(first, second, same, orders) >= observed - 1e-12).sum())
    return Mantel(float(observed), reached / (permutations + 1))


def _check_matrices(similarity: Tensor, transfer: Tensor, strata: Sequence[object] | None, within: bool) -> None:
    number = len(similarity)
    if similarity.shape != transfer.shape or (strata is not None and len(strata) != number):
        found = f"{tuple(similarity.shape)}, {tuple(transfer.shape)}, {None if strata is None else len(strata)} strata"
        raise ShapeError("similarity, transfer and strata must be over the same tasks", found=found)
    off = _off_diagonal(number)
    if not (similarity[off].isfinite().all() and transfer[off].isfinite().all()):
        raise UsageError("similarity and transfer must be finite off the diagonal", remedy="leave those tasks out")
    if number < 3 or (within and strata is None):
        raise UsageError(
            "a Mantel test needs three tasks, and strata to permute within", found=f"{number} tasks, strata {strata}"
        )


def _off_diagonal(number: int) -> Tensor:
    return ~torch.eye(number, dtype=torch.bool)


def _ranks(matrix: Tensor) -> Tensor:
    """Ranks of the entries off the diagonal, mean where they tie, centred and of norm one; zeros on the diagonal."""
    from scipy.stats import rankdata  # scipy takes a while to import

    off = _off_diagonal(len(matrix))
    ranks = torch.zeros(matrix.shape, dtype=torch.float64)
    ranks[off] = torch.from_numpy(np.asarray(rankdata(matrix[off].double().numpy()), dtype=np.float64))
    return _standard(ranks)


def _same_stratum(strata: Sequence[object]) -> Tensor:
    same = torch.tensor([[float(one == other) for other in strata] for one in strata], dtype=torch.float64)
    return _standard(same)


def _standard(matrix: Tensor) -> Tensor:
    """Centred and of norm one off the diagonal, zeros on it, so that a sum of products is a correlation."""
    off = _off_diagonal(len(matrix))
    values = matrix[off] - matrix[off].mean()
    norm = values.norm()
    if norm < 1e-9:
        raise UsageError("the values off the diagonal must not all be the same", found=float(matrix[off][0]))
    standard = torch.zeros_like(matrix)
    standard[off] = values / norm
    return standard


def _correlations(first: Tensor, second: Tensor, same: Tensor | None, orders: Tensor) -> Tensor:
    """(orders,) correlations of `second` with `first` after each reordering of its tasks; partial ones given `same`."""
    permuted = first[orders[:, :, None], orders[:, None, :]].flatten(1)  # (orders, tasks * tasks)
    xy = permuted @ second.flatten()
    if same is None:
        return xy
    xz, yz = permuted @ same.flatten(), second.flatten() @ same.flatten()
    return (xy - xz * yz) / ((1 - xz**2) * (1 - yz**2)).sqrt()


def _orders(number: int, strata: Sequence[object] | None, permutations: int, seed: int) -> Iterator[Tensor]:
    """Blocks (orders, tasks) of random permutations, within strata where they are given."""
    random = np.random.default_rng(seed)
    groups = [np.arange(number)]
    if strata is not None:
        groups = [np.array([i for i in range(number) if strata[i] == one]) for one in dict.fromkeys(strata)]
    for start in range(0, permutations, BLOCK):
        orders = np.empty((min(BLOCK, permutations - start), number), dtype=np.int64)
        for group in groups:
            orders[:, group] = random.permuted(np.tile(group, (len(orders), 1)), axis=1)
        yield torch.from_numpy(orders)
