"""`lorary export`: parse, call one recipe, say where the result lies and how it is used."""

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from lorary.adapt.export_settings import StaticSettings
from lorary.cli.flags import CommandOptions, OptionValues, with_options
from lorary.cli.options import LibraryPath, Output, RouterFields
from lorary.cli.route import route_fields
from lorary.errors import UsageError
from lorary.flags import option_of
from lorary.serve.export_settings import VLLM, ExportSettings

if TYPE_CHECKING:
    from lorary.adapt.export_static import StaticExport


@dataclass(frozen=True)
class ExportCommand:
    """What the export is made with.

    Args:
        router: for vllm: arrow, projection or norm; the library's by default.
        base: for transformers: the base model; the library's own by default.
    """

    router: str | None = None
    base: str | None = None


@with_options
def export(
    library: LibraryPath,
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="for vllm the folder in which the adapter's folder is made, else new")
    ],
    options: Annotated[
        OptionValues, CommandOptions((ExportSettings, ExportCommand, StaticSettings, RouterFields, Output))
    ],
) -> None:
    """Write the library for other tools: as one routed adapter, as plain adapters, or merged into the base."""
    from lorary.recipes.export import run_export, run_static_export

    settings, command = ExportSettings(**options[ExportSettings]), ExportCommand(**options[ExportCommand])
    as_json = Output(**options[Output]).as_json
    if settings.engine != VLLM:
        routing = [option_of(RouterFields, name) for name in options[RouterFields]]
        _refuse([*(["--router"] if command.router else []), *routing], settings.engine)
        exported = run_static_export(library, out, engine=settings.engine, base=command.base, **options[StaticSettings])
        print(json.dumps(asdict(exported))) if as_json else _print(exported)
        return
    static = [option_of(StaticSettings, name) for name in options[StaticSettings]]
    _refuse([*(["--base"] if command.base else []), *static], VLLM)
    fields = route_fields(router=command.router, **options[RouterFields])
    result = run_export(library, out, engine=settings.engine, **fields)
    if as_json:
        print(json.dumps(asdict(result)))
        return
    print(f"{len(result.experts)} experts routed by {result.router}, rank {result.rank}: {result.adapter}")
    print(
        f"vllm serve BASE --enable-lora --max-lora-rank {result.max_lora_rank} --lora-modules routed={result.adapter}"
    )


def _refuse(given: list[str], engine: str) -> None:
    if given:
        raise UsageError(f"{given[0]} says nothing to this export", found=f"--for {engine}", remedy="leave it out")


def _print(exported: "StaticExport") -> None:
    rank = "" if exported.rank is None else f", rank {exported.rank}"
    print(f"{len(exported.experts)} adapters for {exported.engine}{rank}: {exported.path}")
    if exported.difference is not None:
        print(
            f"logits differ from the routed model's by {exported.difference:.1e} of the adapter's effect, "
            f"as written by {exported.rounding:.1e}"
        )
