"""`lorary merge`: parse, call one recipe, say where the result lies."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from lorary.adapt.merge_settings import MergeSettings
from lorary.cli.flags import CommandOptions, OptionValues, with_options
from lorary.cli.options import LibraryPath, Output


@with_options
def merge(
    library: LibraryPath,
    out: Annotated[str, typer.Option("--out", metavar="ADAPTER", help="folder of the result, new")],
    options: Annotated[OptionValues, CommandOptions((MergeSettings, Output))],
) -> None:
    """Make one adapter of several, without data."""
    from lorary.recipes.merge import run_merge

    result = run_merge(library, out, **options[MergeSettings])
    if Output(**options[Output]).as_json:
        print(json.dumps(asdict(result)))
        return
    left_out = f", {result.error:.2%} of the update left out" if result.error else ""
    print(f"{len(result.parents)} adapters, rank {result.rank}{left_out}: {result.adapter}")
