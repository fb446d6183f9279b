"""`lorary library`: what is in a library, and is it whole."""

import json
import sys
from collections.abc import Sized
from dataclasses import asdict
from typing import Annotated

import typer

from lorary.cli.options import (
    BASE_HELP,
    Device,
    Dtype,
    ForceBase,
    Json,
    LibraryPath,
    OptionalBase,
    Route,
    split_names,
)
from lorary.cli.route import route_fields

library_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look into a library and change it.")


@library_app.command("ls")
def ls(library: LibraryPath, as_json: Json = False) -> None:
    """List the adapters of a library."""
    from lorary.library.store import Library

    rows, problems = Library.open(library).listing()
    if as_json:
        print(json.dumps(rows))
    else:
        print(f"{'name':<32} {'rank':>4} {'parameters':>12}  {'hash':<12}  tasks")
        for row in rows:
            tasks, digest = ", ".join(row["tasks"]), row["hash"][:12]
            print(f"{row['name']:<32} {row['rank']:>4} {row['num_parameters']:>12,}  {digest}  {tasks}")
        unread = f", {len(problems)} more that cannot be read" if problems else ""
        print(f"{len(rows)} adapters{unread}")
    for name, error in problems.items():
        print(f"error: adapter '{name}': {error!s}", file=sys.stderr)
    if problems:
        raise typer.Exit(1)


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


@library_app.command("prepare")
def prepare(
    library: LibraryPath,
    router: Annotated[
        str, typer.Option(help="centroid, phatgoose, contrast, task-predictor, retrieval, or norm to calibrate it")
    ],
    tasks: Annotated[
        str,
        typer.Option(metavar="TASKS", help="the experts' data: builtin, a .jsonl file, a folder or a data set's id"),
    ] = "builtin",
    mapping: Annotated[
        str | None, typer.Option("--map", metavar="NAME=TASK,...", help="tasks of experts that name none themselves")
    ] = None,
    experts: Annotated[str | None, typer.Option(help="only these experts, by name, separated by commas")] = None,
    rows: Annotated[
        int | None, typer.Option(help="training rows of each task, at most; 100, or 16 for contrast")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the rows that are drawn, and of their order")] = 0,
    features: Annotated[
        str, typer.Option(help="task-predictor, retrieval: hidden (of the base) or text (a sentence encoder)")
    ] = "hidden",
    steps: Annotated[int, typer.Option(help="phatgoose: optimiser steps of an expert's gates")] = 100,
    base: OptionalBase = None,
    force_base: ForceBase = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Compute what a router needs beyond weights from the experts' own data; run it again to go on."""
    from lorary.recipes.prepare import run_prepare

    result = run_prepare(
        library,
        router,
        tasks=tasks,
        mapping=mapping,
        experts=split_names(experts),
        base=base,
        force_base=force_base,
        device=device,
        dtype=dtype,
        rows=rows,
        seed=seed,
        features=features,
        steps=steps,
    )
    if as_json:
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
