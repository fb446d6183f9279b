"""Clusterings that know nothing of the weights: what model-based clustering must beat."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.cluster.kmeans import kmeans_labels
from lorary.errors import UsageError
from lorary.keys import keyed_generator


def random_labels(names: Sequence[str], k: int, seed: int = 42) -> list[int]:
    """Random clusters of nearly equal sizes, without an empty one.

    Args:
        names: of the adapters; the clusters do not depend on their order.
        k: number of clusters.
        seed: of the draw.

    Returns:
        A label in 0..k-1 for each name.

    Raises:
        UsageError: if `k` is not between 1 and the number of names.
    """
    check_k(k, len(names))
    shuffled = torch.randperm(len(names), generator=keyed_generator("random clusters", seed, k)).tolist()
    label = {name: place % k for name, place in zip(sorted(names), shuffled, strict=True)}
    return [label[name] for name in names]


def family_labels(families: Sequence[str]) -> list[int]:
    """One cluster per family.

    Args:
        families: family of each task.

    Returns:
        A label for each task, numbered by the families' names.
    """
    number = {family: label for label, family in enumerate(sorted(set(families)))}
    return [number[family] for family in families]


def text_labels(embeddings: Float[Tensor, "tasks features"], k: int, seed: int = 42) -> list[int]:
    """Clusters of tasks by what their texts say: k-means on unit vectors.

    Args:
        embeddings: one vector per task, such as the mean of a sentence encoder over its rows; none zero.
        k: number of clusters.
        seed: of k-means.

    Returns:
        A label for each task.

    Raises:
        UsageError: if `k` is not between 1 and the number of tasks.
    """
    check_k(k, len(embeddings))
    return kmeans_labels(torch.nn.functional.normalize(embeddings.float(), dim=1).contiguous(), k, seed)


def check_k(k: int, number: int) -> None:
    """Refuse a number of clusters that does not fit.

    Args:
        k: number of clusters.
        number: of what is to be clustered.

    Raises:
        UsageError: if `k` is not between 1 and `number`.
    """
    if not 1 <= k <= number:
        raise UsageError(
            f"k must be between 1 and {number}, the number of distinct adapters that compute something",
            found=k,
            remedy=f"ask for --k {number} or fewer" if k > number else "ask for --k 1 or more",
        )
