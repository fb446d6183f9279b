"""`lorary cluster`: opens a library and groups its adapters."""

from typing import Literal

from lorary.library.clusters import ClusterResult, cluster_library
from lorary.library.store import Library
from lorary.numbers import check_count, check_seed


def run_cluster(
    library_path: str, *, k: int | Literal["auto"] = "auto", method: str = "delta", seed: int = 42
) -> ClusterResult:
    """Cluster the adapters of a library, or find the answer of an earlier call.

    Args:
        library_path: folder of the library; imported adapters are as good as any.
        k: number of clusters, or `auto`.
        method: `delta`, `paper-2024` or `sketch`, see `lorary.cluster.mbc.cluster_adapters`.
        seed: of k-means and of the paper's SVD.

    Returns:
        The clusters.

    Raises:
        LibraryError: if there is no library, it has fewer than two adapters, or a stored answer is damaged.
        UsageError: if an option is out of range, or there are fewer distinct adapters than clusters.
        AdapterError: if an adapter is damaged, or two cannot be compared by the method.
    """
    if k != "auto":
        check_count("--k", k)
    check_seed("--seed", seed, most=2**32 - 1)  # of scikit-learn
    return cluster_library(Library.open(library_path), k=k, method=method, seed=seed)
