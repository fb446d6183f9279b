"""Model-based clustering: group adapters by their weights, without data.

Paper: 2405.11157, MBC: k-means on the rows of the cosine similarities between adapters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.adapter import Adapter
from lorary.cluster.baselines import check_k
from lorary.cluster.compare import METHODS, PairComparison, compare
from lorary.cluster.kmeans import Candidate, best_candidate, kmeans_labels, mean_silhouette, try_candidates
from lorary.errors import AdapterError, UsageError

# Neighbours that are reported for each adapter.
NEAREST = 5


@dataclass(frozen=True)
class Clustering:
    """Adapters in clusters.

    Args:
        names: of the adapters, in the order given.
        labels: cluster of each: 0 is the largest (ties: first name first); -1 for an adapter that computes nothing.
        k: number of clusters.
        similarity: cosines between all adapters by the method; float64, or float32 for sketches.
        cohesion: for each cluster the mean cosine between two distinct members, None where there is only one.
        silhouette: mean over distinct adapters with the distance 1 - cosine; None where it has no meaning.
        stability: mean adjusted Rand index between runs on random subsets; None where k was given.
        zero: adapters that compute nothing: they are in no cluster.
        duplicates: groups of adapters with the same update: k-means counts each group once.
        nearest: the most similar adapters of each, with the cosine, best first; none of those that compute nothing.
        method: how the adapters were compared.
        candidates: the numbers of clusters that were tried; empty where k was given.
    """

    names: tuple[str, ...]
    labels: tuple[int, ...]
    k: int
    similarity: Float[Tensor, "experts experts"]
    cohesion: tuple[float | None, ...]
    silhouette: float | None
    stability: float | None
    zero: tuple[str, ...]
    duplicates: tuple[tuple[str, ...], ...]
    nearest: dict[str, list[tuple[str, float]]]
    method: str
    candidates: tuple[Candidate, ...] = ()


def cluster_adapters(
    names: Sequence[str],
    load: Callable[[str], Adapter],
    *,
    k: int | Literal["auto"],
    method: str = "delta",
    seed: int = 42,
    candidates: Sequence[int] | None = None,
) -> Clustering:
    """Group adapters whose updates point in similar directions.

    - `delta` (the default) compares whole updates ΔW through rank x rank products: blind to the gauge, the initial draw
      and unequal ranks.
    - `paper-2024` is the paper's recipe over flattened factors, step by step with scikit-learn's numbers; it needs
      equal ranks and one initial draw, and warns where there are several.
    - `sketch` estimates `delta` from 16 KiB per adapter, for libraries of many thousands.

    Adapters that compute nothing stay outside; adapters with the same update are counted once and share their label.
    The result does not depend on the order of the names.

    Args:
        names: of the adapters, each once.
        load: reads an adapter by name; called once per name.
        k: number of clusters, or `auto`: the largest silhouette among the candidates that are stable, see
            `best_candidate`.
        method: `delta`, `paper-2024` or `sketch`.
        seed: of k-means and of the paper's SVD.
        candidates: numbers of clusters for `auto` to try; None takes some between 2 and half the adapters.

    Returns:
        The clusters, with what there is to say about them.

    Raises:
        UsageError: if an option is out of range, or there are fewer distinct adapters than clusters.
        AdapterError: if two adapters cannot be compared.
    """
    _check_options(names, method)
    ordered = sorted(names)
    compared = compare((load(name) for name in ordered), method, seed)
    _check_finite(ordered, compared)
    same_as = compared.representatives()
    chosen = sorted({i for i in same_as if i >= 0})
    if not chosen:
        raise UsageError("at least one adapter must compute something to be clustered", found="lora_b is zero in all")
    similarity = compared.similarity(chosen)
    # The paper's recipe is in float32 throughout: the same rounding leads to the same clusters.
    rows = similarity.float() if method == "paper-2024" else similarity
    labels, tried = _grouped(rows, k, seed, candidates)
    place = {i: position for position, i in enumerate(chosen)}
    position = [place.get(i, -1) for i in same_as]
    labels = _renumbered(labels, position)
    position_of = dict(zip(ordered, position, strict=True))
    return _described(tuple(names), [position_of[name] for name in names], labels, similarity, method, tried)


def _check_options(names: Sequence[str], method: str) -> None:
    if method not in METHODS:
        raise UsageError(f"the clustering method must be one of {', '.join(METHODS)}", found=method)
    if not names or len(set(names)) < len(names):
        raise UsageError("there must be at least one adapter to cluster, each named once", found=f"{len(names)} names")


def _check_finite(names: Sequence[str], compared: PairComparison) -> None:
    finite = compared.norms.isfinite()
    if compared.flat_gram is not None:
        finite &= compared.flat_gram.diagonal().isfinite()
    broken = [name for name, is_finite in zip(names, finite.tolist(), strict=True) if not is_finite]
    if broken:
        raise AdapterError(
            f"adapter '{broken[0]}' must have finite numbers only to be compared",
            found="inf or nan in its factors" + (f", as in {len(broken) - 1} more" if len(broken) > 1 else ""),
            remedy="remove it, or train it again",
        )


def _grouped(
    rows: Tensor, k: int | Literal["auto"], seed: int, candidates: Sequence[int] | None
) -> tuple[list[int], tuple[Candidate, ...]]:
    """Labels of distinct adapters, and what was tried to find their number."""
    if k != "auto":
        check_k(k, len(rows))
    tried = try_candidates(rows, candidates, seed) if k == "auto" else ()
    number = best_candidate(tried).k if k == "auto" else k
    labels = kmeans_labels(rows, number, seed)
    if len(set(labels)) < number:
        raise UsageError(
            f"there must be {number} adapters of different directions for {number} clusters",
            found=f"{len(set(labels))}: others differ in size only",
            remedy=f"ask for --k {len(set(labels))} or fewer",
        )
    return labels, tried


def _renumbered(labels: Sequence[int], position: Sequence[int]) -> list[int]:
    """Number clusters by size (all members counted), then by the first member in the order of names.

    Args:
        labels: of the distinct adapters.
        position: of each adapter among the distinct ones, -1 for a zero update; in the order of names.
    """
    sizes = dict.fromkeys(labels, 0)  # in the order of the first member
    for place in position:
        if place >= 0:
            sizes[labels[place]] += 1
    ranked = sorted(sizes, key=lambda label: -sizes[label])  # stable: ties stay in the order of the first member
    return [ranked.index(label) for label in labels]


def _described(
    names: tuple[str, ...],
    position: Sequence[int],
    labels: Sequence[int],
    similarity: Tensor,
    method: str,
    tried: tuple[Candidate, ...],
) -> Clustering:
    """All there is to say about a clustering of distinct adapters, told of all adapters."""
    k = max(labels) + 1
    groups: dict[int, list[str]] = {}
    for name, place in zip(names, position, strict=True):
        groups.setdefault(place, []).append(name)
    whole = _expanded(similarity, position)
    return Clustering(
        names=names,
        labels=tuple(labels[place] if place >= 0 else -1 for place in position),
        k=k,
        similarity=whole,
        cohesion=tuple(_cohesion(similarity, labels, cluster) for cluster in range(k)),
        silhouette=mean_silhouette(similarity, labels),
        stability=best_candidate(tried).stability if tried else None,
        zero=tuple(groups.pop(-1, ())),
        duplicates=tuple(tuple(group) for group in groups.values() if len(group) > 1),
        nearest=_nearest(names, whole, position),
        method=method,
        candidates=tried,
    )


def _expanded(similarity: Tensor, position: Sequence[int]) -> Tensor:
    """The similarity of all adapters from that of the distinct ones; 0 for those that compute nothing."""
    if list(position) == list(range(len(similarity))):
        return similarity
    index = torch.tensor(position)
    whole = similarity[index[:, None], index]
    whole[index < 0] = 0.0
    whole[:, index < 0] = 0.0
    return whole.fill_diagonal_(1.0)


def _cohesion(similarity: Tensor, labels: Sequence[int], cluster: int) -> float | None:
    members = torch.tensor([i for i, label in enumerate(labels) if label == cluster])
    if len(members) == 1:
        return None
    within = similarity[members[:, None], members].double()
    return float((within.sum() - within.trace()) / (len(members) * (len(members) - 1)))


def _nearest(names: tuple[str, ...], whole: Tensor, position: Sequence[int]) -> dict[str, list[tuple[str, float]]]:
    """The most similar adapters of each, those that compute nothing left out."""
    is_zero = torch.tensor(position) < 0
    alive = (~is_zero).nonzero().flatten().tolist()
    neighbours: dict[str, list[tuple[str, float]]] = {name: [] for name in names}
    for i in alive:
        row = whole[i].double().masked_fill(is_zero, -torch.inf)
        row[i] = -torch.inf
        values, places = row.topk(min(NEAREST, len(alive) - 1))
        neighbours[names[i]] = [(names[j], value) for j, value in zip(places.tolist(), values.tolist(), strict=True)]
    return neighbours
