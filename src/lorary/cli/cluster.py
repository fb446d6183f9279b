"""`lorary cluster`: which adapters of a library are alike."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lorary.cli.flags import CommandOptions, OptionValues, with_options
from lorary.cli.options import LibraryPath, Output
from lorary.flags import flag
from lorary.library.cluster_options import ClusterOptions


@dataclass(frozen=True)
class ClusterCommand:
    """Where the map goes.

    Args:
        report: write a page with the map that opens offline, of 1,000 adapters at most.
    """

    report: str | None = flag(None, metavar="FILE.html")


@with_options
def cluster(
    library: LibraryPath, options: Annotated[OptionValues, CommandOptions((ClusterOptions, ClusterCommand, Output))]
) -> None:
    """Group the adapters of a library by what they compute, without data and without the base model."""
    from lorary.library.store import Library
    from lorary.recipes.cluster import cluster as cluster_adapters
    from lorary.report.cluster_text import print_clusters
    from lorary.report.clusters import check_size, map_of, write_map
    from lorary.report.shell import check_writable

    report = ClusterCommand(**options[ClusterCommand]).report
    if report:
        check_writable(Path(report))
        check_size(len(Library.open(library)))
    result = cluster_adapters(library, **options[ClusterOptions])
    if report:
        write_map(Path(report), map_of(result))
    if Output(**options[Output]).as_json:
        print(json.dumps(result.to_json()))
        return
    print_clusters(result)
    if report:
        print(f"report: {report}")
