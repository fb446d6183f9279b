"""What a map of clusters can hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Float
from torch import Tensor

from lorary.cluster.kmeans import Candidate
from lorary.errors import ShapeError, UsageError
from lorary.library.clusters import MOST_MAPPED
from lorary.report.cluster_plots import Matrix

METHOD_NOTES = {
    "delta": "Cosine between the whole updates of two adapters: what they add to the base model, layer by layer. How "
    "the factors are written plays no part.",
    "sketch": "Cosine between the whole updates of two adapters, estimated from a sketch of each.",
    "paper-2024": "Cosine between the embedded factors of two adapters, as in the paper. It depends on how the factors "
    "are written, not only on what they compute.",
}


@dataclass(frozen=True)
class ClusterMap:
    """One page.

    Args:
        title: the heading.
        names: of the adapters that were clustered, in the order of the matrix.
        labels: cluster of each, 0 and up.
        cosine: similarity of the adapters, symmetric.
        cohesion: of each cluster, by its number: mean cosine of two distinct members, None where there is only one.
        method: how the adapters were compared: a key of `METHOD_NOTES`.
        families: of adapters whose family is known, by name.
        silhouette: mean over the adapters; None where there is none (one cluster).
        duplicates: groups of adapters that compute the same.
        zero: adapters that compute nothing, in no cluster.
        candidates: what was tried to choose k; empty where it was given.
        facts: what was run, as label and value.
        versions: of the software, by package.

    Raises:
        ShapeError: if names, labels, cohesion and matrix do not fit.
        UsageError: if there are more adapters than a page shows.
    """

    title: str
    names: Sequence[str]
    labels: Sequence[int]
    cosine: Float[Tensor, "adapters adapters"]
    cohesion: Sequence[float | None]
    method: str = "delta"
    families: Mapping[str, str] = field(default_factory=dict)
    silhouette: float | None = None
    duplicates: Sequence[Sequence[str]] = ()
    zero: Sequence[str] = ()
    candidates: Sequence[Candidate] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.labels) == len(self.cosine):
            sizes = f"{len(self.names)}, {len(self.labels)}, {len(self.cosine)}"
            raise ShapeError("a map must have one name, one label and one row per adapter", found=sizes)
        if self.labels and max(self.labels) >= len(self.cohesion):
            raise ShapeError("every cluster must have a cohesion", found=f"{max(self.labels)}, {len(self.cohesion)}")
        check_size(len(self.names))

    @property
    def distinct(self) -> list[int]:
        """Positions of the adapters of which none is a duplicate of another."""
        again = {name for group in self.duplicates for name in list(group)[1:]}
        return [i for i, name in enumerate(self.names) if name not in again]

    @cached_property
    def matrix(self) -> Matrix:
        """The cosines as an array, in the order of the names."""
        return np.asarray(self.cosine.double().cpu().numpy())


def check_size(num_adapters: int) -> None:
    """Refuse a map that no browser would draw in reasonable time.

    Args:
        num_adapters: adapters of the library.

    Raises:
        UsageError: if they are too many.
    """
    if num_adapters > MOST_MAPPED:
        raise UsageError(
            f"a map shows at most {MOST_MAPPED:,} adapters",
            found=num_adapters,
            remedy="leave out --report: the tables and --json have no limit",
        )
