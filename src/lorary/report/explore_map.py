"""Where the adapters of a library stand on its map."""

import numpy as np
from numpy.typing import NDArray

from lorary.report.cluster_plots import Matrix, plane_points

# From this number of adapters on, t-SNE keeps neighbours together better than the best plane does (trustworthiness at 5
# neighbours: 0.99 against 0.76 of 1,000 adapters in 20 clusters, 0.98 against 0.93 of 50, 0.88 against 0.93 of 12).
LEAST_TSNE = 30
PERPLEXITY = 30
SEED = 42
DIGITS = 4


def map_points(cosine: Matrix) -> NDArray[np.float64]:
    """A point for each adapter, alike ones near each other.

    Few adapters stand in the plane that holds most of what tells them apart. Many would lie on top of each other there,
    and t-SNE starts from that plane. It takes 10 s for 1,000 adapters on one core.

    Args:
        cosine: (adapters, adapters), symmetric, at least two adapters.

    Returns:
        (adapters, 2), each axis within -1..1, the same for equal cosines.
    """
    points, _ = plane_points(cosine)
    if len(cosine) >= LEAST_TSNE:
        points = _tsne(cosine, points)
    points = points - (points.max(axis=0) + points.min(axis=0)) / 2
    # Both axes have one scale.
    return np.round(points / (np.abs(points).max() or 1.0), DIGITS)


def _tsne(cosine: Matrix, start: NDArray[np.float64]) -> NDArray[np.float64]:
    from sklearn.manifold import TSNE  # takes more than a second to import

    distance = (1 - cosine).clip(min=0)
    np.fill_diagonal(distance, 0)
    # Its usual scale of a start; adapters that compute the same get the least of room between them.
    start = start / (start.std(axis=0).max() or 1.0) * 1e-4
    perplexity = min(PERPLEXITY, (len(cosine) - 1) / 3)
    model = TSNE(metric="precomputed", init=start, perplexity=perplexity, random_state=SEED, n_jobs=1)
    return np.asarray(model.fit_transform(distance), dtype=np.float64)
