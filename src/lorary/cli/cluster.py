"""`lorary cluster`: which adapters of a library are alike."""

import json
from typing import Annotated, Literal

import typer

from lorary.cli.options import Json, LibraryPath


def cluster(
    library: LibraryPath,
    k: Annotated[str, typer.Option("--k", metavar="N|auto", help="number of clusters, or auto")] = "auto",
    method: Annotated[str, typer.Option(help="delta, paper-2024, or sketch for many thousands")] = "delta",
    seed: Annotated[int, typer.Option(help="of k-means")] = 42,
    report: Annotated[str | None, typer.Option(metavar="FILE.html", help="write a page with the map")] = None,
    as_json: Json = False,
) -> None:
    """Group the adapters of a library by what they compute, without data and without the base model."""
    from pathlib import Path

    from lorary.library.store import Library
    from lorary.recipes.cluster import run_cluster
    from lorary.report.cluster_text import print_clusters
    from lorary.report.clusters import check_size, map_of, write_map
    from lorary.report.shell import check_writable

    number = _number_of_clusters(k)
    if report:
        check_writable(Path(report))
        check_size(len(Library.open(library)))
    result = run_cluster(library, k=number, method=method, seed=seed)
    if report:
        write_map(Path(report), map_of(result))
    if as_json:
        print(json.dumps(result.to_json()))
        return
    print_clusters(result)
    if report:
        print(f"report: {report}")


def _number_of_clusters(k: str) -> int | Literal["auto"]:
    from lorary.errors import UsageError

    if k == "auto":
        return "auto"
    try:
        return int(k)
    except ValueError:
        raise UsageError("--k must be a whole number or auto", found=k) from None
