"""`lorary cluster`: opens a library and groups its adapters."""

from typing import Literal

from lorary.library.clusters import ClusterResult, cluster_library
from lorary.library.store import Library
from lorary.numbers import check_count, check_seed


def run_cluster(
    library_path: str, *, k: int | Literal["auto"] = "auto", method: str = "delta", seed: int = 42
) -> ClusterResult:
    """Open the library in a folder and cluster it: arguments, result and errors are those of `cluster_library`."""
    if k != "auto":
        check_count("--k", k)
    check_seed("--seed", seed, most=2**32 - 1)  # of scikit-learn
    return cluster_library(Library.open(library_path), k=k, method=method, seed=seed)
