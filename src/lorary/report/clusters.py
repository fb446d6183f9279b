"""The map of a clustered library: one page with a heat map, a tree, a plane and tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.cluster.hierarchy import leaves_list
from torch import Tensor

from lorary.cluster.kmeans import Candidate
from lorary.errors import ShapeError, UsageError
from lorary.library.clusters import MOST_MAPPED, ClusterResult
from lorary.report.cluster_plots import (
    Matrix,
    cluster_colour,
    cluster_title,
    cluster_tree,
    plane_plot,
    tree_plot,
)
from lorary.report.markup import MISSING, counted
from lorary.report.plots import cosine_plot
from lorary.report.shell import Section, page_html, part, write_page

SCRIPTS = (
    "core.js", "svg.js", "axes.js", "grid.js", "similarity.js", "tree.js", "labels.js", "plane.js", "choice.js",
    "start_clusters.js", "listen.js",
)  # fmt: skip
# A longer table of adapters scrolls.
NUM_PLAIN_ROWS = 40
NUM_NEAREST = 3

METHOD_NOTES = {
    "delta": "Cosine between the whole updates of two adapters: what they add to the base model, layer by layer. It "
    "does not depend on how an update is factored.",
    "sketch": "Cosine between the whole updates of two adapters, estimated from a sketch of each.",
    "paper-2024": "Cosine between the embedded factors of two adapters, as in the paper. It depends on how an update "
    "is factored, not only on what it computes.",
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
        silhouette: mean over the adapters; None with one cluster.
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


def map_of(result: ClusterResult) -> ClusterMap:
    """The contents of the page.

    Args:
        result: the clusters of a library.

    Raises:
        UsageError: if there are more adapters than a page shows.
    """
    document, library = result.document, Path(result.library).resolve().name
    names, labels, k = document["names"], document["labels"], document["k"]
    if result.cosine is None:
        check_size(len(names))
    assert result.cosine is not None
    clustered = [i for i, label in enumerate(labels) if label >= 0]
    facts = {
        "library": f"{library}, {len(names)} adapters",
        "base model": result.base,
        "method": document["method"],
        "clusters": f"{k}, {'chosen by silhouette and stability' if document['is_chosen'] else 'as asked for'}",
        "seed": str(document["seed"]),
    }
    if (agreement := result.agreement()) is not None:
        facts["agreement with families"] = f"adjusted Rand {agreement[0]:.2f}, mutual information {agreement[1]:.2f}"
    return ClusterMap(
        title=f"{library}: {counted(len(names), 'adapter')} in {counted(k, 'cluster')}",
        names=[names[i] for i in clustered],
        labels=[labels[i] for i in clustered],
        cosine=result.cosine[clustered][:, clustered],
        families=result.families,
        candidates=[Candidate(**candidate) for candidate in document["candidates"]],
        facts=facts,
        versions={package: version(package) for package in ("lorary", "torch", "scikit-learn")},
        **{key: document[key] for key in ("cohesion", "method", "silhouette", "duplicates", "zero")},
    )


def write_map(path: Path, cluster_map: ClusterMap) -> None:
    """Write the page, as `write_page` does."""
    write_page(path, render_map(cluster_map))


def render_map(cluster_map: ClusterMap) -> str:
    """The page as one string, as `page_html` makes it."""
    plots = _plots(cluster_map)
    return page_html(
        cluster_map.title,
        cluster_map.facts,
        _sections(cluster_map, plots),
        plots,
        scripts=SCRIPTS,
        styles=("style.css", "clusters.css"),
    )


def _plots(page: ClusterMap) -> dict[str, Any]:
    names, labels, cosine = list(page.names), list(page.labels), page.matrix
    tree = cluster_tree(cosine) if len(names) > 1 else None
    leaves = [0] if tree is None else leaves_list(tree).tolist()
    # By cluster, and inside a cluster as the tree has them, so that what is alike is side by side.
    order = sorted(leaves, key=lambda i: labels[i])
    sorted_names, groups = [names[i] for i in order], [cluster_title(labels[i]) for i in order]
    families = [page.families.get(name, "") for name in sorted_names]
    clusters = sorted(set(labels))
    return {
        "colours": {cluster_title(cluster): cluster_colour(cluster) for cluster in clusters},
        "families": dict(page.families),
        "similarity": cosine_plot(cosine[order][:, order], sorted_names, families, groups),
        "tree": None if tree is None else tree_plot(tree, names, labels),
        "plane": plane_plot(cosine, names, labels) if len(names) > 2 else None,
        "candidates": [[c.k, round(c.silhouette, 4), c.stability] for c in page.candidates],
        "k": len(clusters),
    }


def _sections(page: ClusterMap, plots: Mapping[str, Any]) -> list[Section]:
    """The sections that there is something for, in the order in which they are read."""
    sections: list[Section] = []

    def add(key: str, title: str, *values: Any) -> None:
        sections.append((key, title, part("clusters.html", key, *values)))

    add("clusters", "Clusters", page, _means_inside_and_across(page), _cluster_rows(page))
    if len(page.names) > 1:
        add("heat", "Every pair", METHOD_NOTES[page.method])
    if plots["plane"]:
        add("plane", "In the plane", plots["plane"]["share"], len(set(page.families.values())) > 1)
    if plots["tree"]:
        add("tree", "As a tree")
    if page.candidates:
        add("choice", "How many clusters")
    add("adapters", "Every adapter", _adapter_rows(page), bool(page.families), len(page.names) > NUM_PLAIN_ROWS)
    add("reading", "How to read this page", page.versions)
    return sections


def _badge(cluster: int) -> dict[str, Any]:
    return {"title": cluster_title(cluster), "colour": cluster_colour(cluster)}


def _means_inside_and_across(page: ClusterMap) -> list[tuple[float, str]]:
    """Mean cosine of two adapters of one cluster, and of two clusters, where there are such pairs."""
    # A pair of duplicates says nothing about how alike clusters are.
    duplicates = {name for group in page.duplicates for name in list(group)[1:]}
    distinct = [i for i, name in enumerate(page.names) if name not in duplicates]
    labels, cosine = np.asarray(page.labels)[distinct], page.matrix[np.ix_(distinct, distinct)]
    is_same_cluster = labels[:, None] == labels
    pairs = np.triu(np.ones_like(is_same_cluster), k=1)
    masks = ((pairs & is_same_cluster, "inside a cluster"), (pairs & ~is_same_cluster, "across clusters"))
    return [(float(cosine[mask].mean()), where) for mask, where in masks if mask.any()]


def _cluster_rows(page: ClusterMap) -> list[dict[str, Any]]:
    """Each cluster with its members, its cohesion and the other cluster of the highest mean cosine."""
    clusters, labels = sorted(set(page.labels)), np.asarray(page.labels)
    member = (labels[:, None] == np.asarray(clusters)).astype(float)  # (adapters, clusters)
    sizes = member.sum(axis=0)
    means = member.T @ page.matrix @ member / (sizes[:, None] * sizes)  # (clusters, clusters)
    np.fill_diagonal(means, -np.inf)
    rows = []
    for cluster, cosines in zip(clusters, means, strict=True):
        nearest = int(cosines.argmax())
        rows.append(
            {
                "cluster": _badge(cluster),
                "members": [name for name, label in zip(page.names, page.labels, strict=True) if label == cluster],
                "cohesion": page.cohesion[cluster],
                "next": {**_badge(clusters[nearest]), "cosine": cosines[nearest]} if len(clusters) > 1 else None,
            }
        )
    return rows


def _adapter_rows(page: ClusterMap) -> list[dict[str, Any]]:
    """Each adapter with its cluster and the adapters nearest to it."""
    names, labels = page.names, page.labels
    rows = []
    for i in sorted(range(len(names)), key=lambda i: (labels[i], names[i])):
        cosines = page.matrix[i]
        neighbours = sorted((j for j in range(len(names)) if j != i), key=lambda j: (-cosines[j], names[j]))
        nearest = [
            {"name": names[j], "is_inside": labels[i] == labels[j], "cosine": cosines[j]}
            for j in neighbours[:NUM_NEAREST]
        ]
        family = page.families.get(names[i], MISSING)
        rows.append({"name": names[i], "family": family, "cluster": _badge(labels[i]), "nearest": nearest})
    return rows
