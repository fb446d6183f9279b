"""k-means on similarity rows, and how many clusters to take."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.cluster.agreement import agreement
from lorary.errors import UsageError
from lorary.keys import keyed_generator

# Runs from random starts, of which the best is kept: the paper's number.
STARTS = 10
# Runs on random subsets by which stability is judged, and the share of the adapters in each.
STABILITY_RUNS = 5
SUBSET = 0.8
# Mean adjusted Rand index between those runs from which on a number of clusters counts as stable.
STABLE = 0.8
# Numbers of clusters tried by default, as far as there are twice as many adapters.
CANDIDATES = (*range(2, 13), 14, 16, 20, 25, 32, 40, 50)


@dataclass(frozen=True)
class Candidate:
    """A number of clusters that was tried.

    Args:
        k: number of clusters.
        silhouette: mean over adapters, in [-1, 1].
        stability: mean adjusted Rand index between runs on random subsets, at most 1.
    """

    k: int
    silhouette: float
    stability: float


def kmeans_labels(points: Float[Tensor, "experts features"], k: int, seed: int) -> list[int]:
    """k-means with k-means++ starts, as scikit-learn does it.

    Args:
        points: float32 or float64.
        k: number of clusters, at most the number of points.
        seed: of the starts.

    Returns:
        A label for each point; fewer than `k` are in use where there are fewer distinct points.
    """
    from sklearn.cluster import KMeans  # takes more than a second to import
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # for too few distinct points
        kmeans = KMeans(n_clusters=k, init="k-means++", n_init=STARTS, random_state=seed % 2**32)
        return [int(label) for label in kmeans.fit_predict(points.numpy())]


def mean_silhouette(similarity: Float[Tensor, "experts experts"], labels: Sequence[int]) -> float | None:
    """Mean silhouette with the distance 1 - cosine; an adapter alone in its cluster counts 0.

    Args:
        similarity: cosines, ones on the diagonal.
        labels: cluster of each adapter.

    Returns:
        A value in [-1, 1], or None where it has no meaning: one cluster, or as many as adapters.
    """
    if not 1 < len(set(labels)) < len(labels):
        return None
    from sklearn.metrics import silhouette_score

    return float(silhouette_score((1 - similarity).numpy(), list(labels), metric="precomputed"))


def stability_of(similarity: Float[Tensor, "experts experts"], k: int, seed: int) -> float:
    """How much clusterings of random subsets agree where they overlap.

    Args:
        similarity: cosines of the adapters.
        k: number of clusters, fewer than a subset holds.
        seed: of the subsets and the starts.

    Returns:
        Mean adjusted Rand index over pairs of runs, 1 for perfect agreement, about 0 for chance.
    """
    number = len(similarity)
    size = round(SUBSET * number)
    runs = []
    for run in range(STABILITY_RUNS):
        order = torch.randperm(number, generator=keyed_generator("stability", seed, k, run))
        chosen = order[:size].sort().values
        labels = kmeans_labels(similarity[chosen][:, chosen].contiguous(), k, seed + 1 + run)
        runs.append(dict(zip(chosen.tolist(), labels, strict=True)))
    scores = []
    for first, second in combinations(runs, 2):
        shared = sorted(first.keys() & second.keys())
        scores.append(agreement([first[i] for i in shared], [second[i] for i in shared]).adjusted_rand)
    return sum(scores) / len(scores)


def try_candidates(
    similarity: Float[Tensor, "experts experts"], candidates: Sequence[int] | None, seed: int
) -> tuple[Candidate, ...]:
    """Judge numbers of clusters.

    Args:
        similarity: cosines of distinct adapters.
        candidates: numbers to try; None takes those of `CANDIDATES` up to half the adapters.
        seed: of the starts and the subsets.

    Returns:
        One entry per number, ascending.

    Raises:
        UsageError: if there is no number to try.
    """
    number = len(similarity)
    counts = [k for k in CANDIDATES if k <= max(2, number // 2)] if candidates is None else sorted({*candidates})
    judged = [_judge(similarity, k, seed) for k in counts if 2 <= k < number]
    tried = tuple(candidate for candidate in judged if candidate is not None)
    if not tried:
        raise UsageError(
            "k 'auto' needs a number of clusters from 2 on that is smaller than the number of different adapters",
            found=f"{number} adapters that differ and compute something, candidates {counts}",
            remedy="give k as a number",
        )
    return tried


def best_candidate(tried: Sequence[Candidate]) -> Candidate:
    """The largest silhouette among the stable numbers; where none is stable, the most stable. Ties: the smaller k.

    Args:
        tried: at least one.
    """
    stable = [candidate for candidate in tried if candidate.stability >= STABLE]
    if stable:
        return max(stable, key=lambda candidate: (candidate.silhouette, -candidate.k))
    return max(tried, key=lambda candidate: (candidate.stability, -candidate.k))


def _judge(similarity: Tensor, k: int, seed: int) -> Candidate | None:
    """The candidate, or None where the adapters have fewer directions than that."""
    labels = kmeans_labels(similarity, k, seed)
    silhouette = mean_silhouette(similarity, labels)
    # A subset of k adapters is k clusters whatever they are: that would be stable by construction.
    if len(set(labels)) < k or silhouette is None or round(SUBSET * len(similarity)) <= k:
        return None
    return Candidate(k, silhouette, stability_of(similarity, k, seed))
