"""The map of a clustered library: one page with a heat map, a tree, a plane and tables."""

from pathlib import Path
from typing import Any

from scipy.cluster.hierarchy import leaves_list

from lorary.report.cluster_contents import ClusterMap, check_size
from lorary.report.cluster_plots import (
    cluster_colour,
    cluster_title,
    cluster_tree,
    heat_plot,
    plane_plot,
    tree_plot,
)
from lorary.report.cluster_tables import sections
from lorary.report.shell import check_report, page_html, write_page

__all__ = ["ClusterMap", "check_report", "check_size", "render_map", "write_map"]

SCRIPTS = (
    "core.js",
    "similarity.js",
    "tree.js",
    "labels.js",
    "plane.js",
    "choice.js",
    "start_clusters.js",
    "listen.js",
)


def write_map(path: Path, cluster_map: ClusterMap) -> None:
    """Write a map as one self-contained page, replacing an older one at once or not at all.

    Args:
        path: the file to write, in a folder that exists.
        cluster_map: the contents.

    Raises:
        MissingExtraError: if plotly is not installed.
        UsageError: if the file cannot be written.
    """
    write_page(path, render_map(cluster_map))


def render_map(cluster_map: ClusterMap) -> str:
    """The page as one string.

    Raises:
        MissingExtraError: if plotly is not installed.
    """
    plots = _plots(cluster_map)
    return page_html(
        cluster_map.title,
        cluster_map.facts,
        sections(cluster_map, plots),
        plots,
        scripts=SCRIPTS,
        styles=("style.css", "clusters.css"),
    )


def _plots(cluster_map: ClusterMap) -> dict[str, Any]:
    names, labels, cosine = list(cluster_map.names), list(cluster_map.labels), cluster_map.matrix
    tree = cluster_tree(cosine) if len(names) > 1 else None
    leaves = [0] if tree is None else leaves_list(tree).tolist()
    # By cluster, and inside a cluster as the tree has them, so that what is alike stands together.
    order = sorted(leaves, key=lambda i: labels[i])
    sorted_names, sorted_labels = [names[i] for i in order], [labels[i] for i in order]
    clusters = sorted(set(labels))
    return {
        "colours": {cluster_title(cluster): cluster_colour(cluster) for cluster in clusters},
        "families": dict(cluster_map.families),
        "similarity": heat_plot(cosine[order][:, order], sorted_names, sorted_labels, cluster_map.families),
        "tree": None if tree is None else tree_plot(tree, names, labels),
        "plane": plane_plot(cosine, names, labels) if len(names) > 2 else None,
        "candidates": [[c.k, round(c.silhouette, 4), c.stability] for c in cluster_map.candidates],
        "k": len(clusters),
    }
