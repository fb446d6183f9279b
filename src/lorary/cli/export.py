"""`lorary export`: parse, call one recipe, say where the result lies and how it is served."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from lorary.cli.flags import CommandOptions, OptionValues, with_options
from lorary.cli.options import LibraryPath, Output, RouterFields
from lorary.cli.route import route_fields
from lorary.serve.export_settings import ExportSettings


@with_options
def export(
    library: LibraryPath,
    out: Annotated[str, typer.Argument(metavar="OUT", help="folder in which the adapter's folder is made")],
    options: Annotated[OptionValues, CommandOptions((ExportSettings, RouterFields, Output))],
    router: Annotated[str | None, typer.Option(help="arrow, projection or norm; the library's by default")] = None,
) -> None:
    """Write the library as one adapter that another server routes per token."""
    from lorary.recipes.export import run_export

    fields = route_fields(router=router, **options[RouterFields])
    result = run_export(library, out, **options[ExportSettings], **fields)
    if Output(**options[Output]).as_json:
        print(json.dumps(asdict(result)))
        return
    print(f"{len(result.experts)} experts routed by {result.router}, rank {result.rank}: {result.adapter}")
    print(
        f"vllm serve BASE --enable-lora --max-lora-rank {result.max_lora_rank} --lora-modules routed={result.adapter}"
    )
