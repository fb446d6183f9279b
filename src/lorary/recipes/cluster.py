"""`lorary cluster` and `lorary.cluster`: opens a library and groups its adapters."""

from pathlib import Path

from lorary.flags import OptionValues
from lorary.keywords import with_settings
from lorary.library.cluster_options import ClusterOptions
from lorary.library.clusters import ClusterResult, cluster_library
from lorary.library.store import Library
from lorary.recipes.inputs import library_of


@with_settings(ClusterOptions)
def cluster(library: Library | str | Path, *, options: OptionValues) -> ClusterResult:
    """Group the adapters of a library by what they compute, without data and without the base model.

    Args:
        library: the library, or the path of its folder.
        options: the settings.

    Returns:
        The clusters. They show themselves as a table.

    Raises:
        UsageError: if an argument does not exist or is out of range, or there are fewer distinct adapters than
            clusters.
        LibraryError: if there is no library, or it has fewer than two adapters.
        AdapterError: if an adapter is damaged, or two cannot be compared by the method.
    """
    settings = ClusterOptions(**options[ClusterOptions])
    return cluster_library(library_of(library), k=settings.k, method=settings.method, seed=settings.seed)
