"""`lorary library`: what is in a library, and is it whole."""

import json
import sys
from collections.abc import Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from lorary.cli.flags import CommandOptions, OptionValues, with_options
from lorary.cli.grouped import GroupedCommands
from lorary.cli.options import BASE_HELP, ForceBase, Json, LibraryPath, Output, Route
from lorary.cli.route import route_fields
from lorary.flags import flag
from lorary.recipes.base_options import BaseOptions

library_app = typer.Typer(
    cls=GroupedCommands, no_args_is_help=True, rich_markup_mode=None, help="Look into a library and change it."
)


@library_app.command("ls")
def ls(library: LibraryPath, as_json: Json = False) -> None:
    """List the adapters of a library."""
    from lorary.library.listing import list_library

    adapters, problems = list_library(library)
    if as_json:
        print(json.dumps(adapters))
    else:
        _print_adapters(adapters)
        unread = f", {len(problems)} more that cannot be read" if problems else ""
        print(f"{len(adapters)} adapters{unread}")
    for name, error in problems.items():
        print(f"error: adapter '{name}': {error!s}", file=sys.stderr)
    if problems:
        raise typer.Exit(1)


def _print_adapters(adapters: Sequence[Mapping[str, Any]]) -> None:
    """A table: columns as wide as what is in them; tasks come last, since they may be many."""
    lines = [("name", "rank", "parameters", "hash", "targets", "tasks")]
    for adapter in adapters:
        targets, tasks = adapter["targets"], ", ".join(adapter["tasks"])
        shown = "-" if targets is None else ", ".join(targets)
        number = f"{adapter['num_parameters']:,}"
        lines.append((adapter["name"], str(adapter["rank"]), number, adapter["hash"][:12], shown, tasks))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.rjust(width) if heading in ("rank", "parameters") else cell.ljust(width)
            for heading, cell, width in zip(lines[0], line, widths, strict=True)
        ]
        print("  ".join(cells).rstrip())


@library_app.command("show")
def show(library: LibraryPath, name: Annotated[str, typer.Argument(help="name of the adapter")]) -> None:
    """Print all that is known of one adapter, as JSON."""
    from lorary.library.store import Library

    print(json.dumps(Library.open(library).provenance(name), indent=2))


@library_app.command("add")
def add(
    library: LibraryPath,
    path: Annotated[str, typer.Argument(help="folder of a PEFT LoRA adapter")],
    name: Annotated[str | None, typer.Option(help="name in the library; the folder's by default")] = None,
    base: Annotated[str | None, typer.Option("--base", help=f"{BASE_HELP}; makes the library if there is none")] = None,
    force_base: ForceBase = False,
) -> None:
    """Copy a PEFT adapter into a library, both files as they are."""
    from lorary.library.opening import created_for

    with created_for(library, base) as opened:
        added = opened.add(path, name, force_base=force_base)
    print(f"added '{added}' to {library}")


@library_app.command("remove")
def remove(library: LibraryPath, name: Annotated[str, typer.Argument(help="name of the adapter")]) -> None:
    """Remove an adapter from a library."""
    from lorary.library.store import Library

    Library.open(library).remove(name)
    print(f"removed '{name}' from {library}")


@library_app.command("router")
def router(
    library: LibraryPath,
    route: Route = None,
    reset: Annotated[bool, typer.Option("--reset", help="begin from the router of a new library")] = False,
    as_json: Json = False,
) -> None:
    """Show the router for callers who name none, or change it with --route."""
    from lorary.recipes.router import run_router

    settings = run_router(library, route_fields(route), reset=reset)
    if as_json:
        print(json.dumps(settings))
        return
    for key, value in settings.items():
        print(f"{key:<16} {value if isinstance(value, str) else json.dumps(value)}")


@dataclass(frozen=True)
class PrepareCommand:
    """What is prepared, and from what.

    Args:
        tasks: the experts' data: builtin, a .jsonl file, a folder or a data set's id.
        mapping: tasks of experts that name none themselves.
        experts: only these experts, by name, separated by commas.
        rows: training rows of each task, at most; 100, or 16 for contrast.
        seed: seed of the rows that are drawn, and of their order.
        features: of the prompts: `hidden` (of the base) or `text` (a sentence encoder).
        steps: optimiser steps of an expert's gates.
    """

    tasks: str = flag("builtin", metavar="TASKS")
    mapping: str | None = flag(None, option="--map", metavar="NAME=TASK,...")
    experts: tuple[str, ...] | None = None
    rows: int | None = None
    seed: int = 0
    features: str = flag("hidden", methods=("task-predictor", "retrieval"))
    steps: int = flag(100, methods=("phatgoose",))


@library_app.command("prepare")
@with_options
def prepare(
    library: LibraryPath,
    router: Annotated[
        str, typer.Option(help="centroid, phatgoose, contrast, task-predictor, retrieval, or norm to calibrate it")
    ],
    options: Annotated[OptionValues, CommandOptions((PrepareCommand, BaseOptions, Output))],
) -> None:
    """Compute what a router needs beyond weights from the experts' own data; run it again to go on."""
    from lorary.recipes.prepare import run_prepare

    result = run_prepare(library, router, load=BaseOptions(**options[BaseOptions]), **options[PrepareCommand])
    if Output(**options[Output]).as_json:
        print(json.dumps(asdict(result)))
    else:
        print(f"{len(result.prepared)} experts prepared, {len(result.kept)} kept: {library}, {result.kind}")


@library_app.command("verify")
def verify(library: LibraryPath, as_json: Json = False) -> None:
    """Check every file of a library against its recorded hash; exit code 1 if something is wrong."""
    from lorary.library.store import Library

    opened = Library.open(library)
    problems = opened.verify()
    if as_json:
        print(json.dumps({"ok": not problems, "problems": [asdict(problem) for problem in problems]}))
    else:
        for problem in problems:
            lines = f"{problem.adapter}: {problem.rule}\n  found: {problem.found}\n  remedy: {problem.remedy}"
            print(lines)
        print(f"{_number_of_adapters(opened)} adapters, {len(problems)} problems")
    if problems:
        raise typer.Exit(1)


def _number_of_adapters(library: Sized) -> int:
    from lorary.errors import LibraryError

    try:
        return len(library)
    except LibraryError:  # the folder of the adapters is a link, say, which is among the problems
        return 0
