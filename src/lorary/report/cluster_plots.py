"""The numbers behind the plots of a map of clusters, as small JSON documents that the page's script draws."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

Matrix = NDArray[np.float64]
NUM_HUES = 8
# Joins adapters of several clusters.
MIXED = -1


def cluster_title(cluster: int) -> str:
    """What a cluster is called on the page."""
    return f"cluster {cluster}"


def cluster_colour(cluster: int) -> int:
    """The number of a cluster's colour: the hues in turn, without the grey that means `of several clusters`."""
    return cluster + cluster // (NUM_HUES - 1)


def cluster_tree(cosine: Matrix) -> Matrix:
    """Average linkage over 1 - cosine, with leaves that are alike side by side.

    Args:
        cosine: (adapters, adapters), symmetric, at least two adapters.

    Returns:
        scipy's linkage matrix, (adapters - 1, 4).
    """
    distance = 1 - (cosine + cosine.T) / 2
    np.fill_diagonal(distance, 0)
    # A hair of rounding below zero is no distance.
    return linkage(squareform(np.clip(distance, 0, None), checks=False), "average", optimal_ordering=True)


def tree_plot(tree: Matrix, names: Sequence[str], labels: Sequence[int]) -> dict[str, Any]:
    """The tree as brackets: two arms from their heights to the height at which they meet.

    Args:
        tree: as `cluster_tree` makes it.
        names: of the adapters.
        labels: cluster of each.

    Returns:
        Names and clusters in the order of the leaves; per join the places of both arms, their heights, the height of
        the join and the cluster that all its leaves share (-1 where they do not).
    """
    order = leaves_list(tree).tolist()
    place = {leaf: float(i) for i, leaf in enumerate(order)}
    height = dict.fromkeys(order, 0.0)
    cluster = dict(enumerate(labels))
    joins = []
    for i, (first, second, level, _) in enumerate(tree.tolist()):
        a, b, new = int(first), int(second), len(names) + i
        cluster[new] = cluster[a] if cluster[a] == cluster[b] else MIXED
        place[new], height[new] = (place[a] + place[b]) / 2, level
        joins.append([place[a], place[b], *(round(h, 4) for h in (height[a], height[b], level)), cluster[new]])
    return {"names": [names[i] for i in order], "labels": [labels[i] for i in order], "joins": joins}


def plane_points(cosine: Matrix) -> tuple[Matrix, float]:
    """A point per adapter, and the share of the spread that the plane of the points shows.

    Classical multidimensional scaling: the plane that holds most of what tells the adapters apart, of cosines as the
    inner products of unit vectors.

    Args:
        cosine: (adapters, adapters), symmetric.

    Returns:
        (adapters, 2), and a share of 0..1.
    """
    centred = cosine - cosine.mean(axis=0)
    centred = centred - centred.mean(axis=1, keepdims=True)
    values, vectors = np.linalg.eigh((centred + centred.T) / 2)
    largest = values[::-1][:2].clip(min=0)
    points = vectors[:, ::-1][:, :2] * np.sqrt(largest)
    # An eigenvector has no sign of its own: its largest entry is made positive, so that equal inputs draw alike.
    points = points * np.where(points[np.abs(points).argmax(axis=0), range(points.shape[1])] < 0, -1, 1)
    spread = values.clip(min=0).sum()
    return points, float(largest.sum() / spread) if spread > 0 else 1.0


def plane_plot(cosine: Matrix, names: Sequence[str], labels: Sequence[int]) -> dict[str, Any]:
    """What `plane_points` found, as a page draws it."""
    points, share = plane_points(cosine)
    return {
        "names": list(names),
        "labels": list(labels),
        "points": [[round(float(x), 4) for x in point] for point in points],
        "share": round(share, 4),
    }
