"""`lorary merge`: parse, call one recipe, say where the result lies."""

import json
from typing import Annotated

import typer

from lorary.cli.flags import split_names
from lorary.cli.options import Json, LibraryPath


def merge(
    library: LibraryPath,
    out: Annotated[str, typer.Option("--out", metavar="ADAPTER", help="folder of the result, new")],
    method: Annotated[str, typer.Option(help="mean, concat, mu or ties")] = "mean",
    experts: Annotated[str | None, typer.Option(help="adapters to merge, separated by commas; all otherwise")] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="NAME=W,...", help="adapters with a weight each, in place of equal ones")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="truncate to this rank, and say what that leaves out")] = None,
    as_json: Json = False,
) -> None:
    """Make one adapter of several, without data."""
    from dataclasses import asdict

    from lorary.recipes.merge import run_merge

    result = run_merge(library, out, method, experts=split_names(experts), weights=_parse_weights(weights), rank=rank)
    if as_json:
        print(json.dumps(asdict(result)))
        return
    left_out = f", {result.error:.2%} of the update left out" if result.error else ""
    print(f"{len(result.parents)} adapters, rank {result.rank}{left_out}: {result.adapter}")


def _parse_weights(text: str | None) -> dict[str, float] | None:
    from lorary.errors import UsageError

    if text is None:
        return None
    try:
        pairs = [part.rsplit("=", 1) for part in text.split(",")]
        weights = {name.strip(): float(weight) for name, weight in pairs}
    except ValueError:
        raise UsageError("--weights must give NAME=W, separated by commas", found=text) from None
    if len(weights) < len(pairs):
        raise UsageError("--weights must name each adapter once", found=text)
    return weights
