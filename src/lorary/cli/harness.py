"""`lorary evaluate --harness`: options of its own, and what it hands on."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from lorary.cli.options import split_names

Harness = Annotated[
    bool, typer.Option("--harness", help="TASKS are names of lm-evaluation-harness, separated by commas")
]
HarnessPath = Annotated[
    str | None, typer.Option("--harness-path", metavar="DIR", help="with --harness: folder of further tasks")
]
Shots = Annotated[int | None, typer.Option("--shots", help="with --harness: examples in each prompt")]


def evaluate_harness(
    is_asked: bool,
    library: str,
    tasks: str,
    *,
    routers: str,
    as_json: bool,
    without: Mapping[str, object],
    **settings: Any,
) -> None:
    """Run tasks of the harness and print what came of it.

    Args:
        is_asked: whether `--harness` was given, and not its further options alone.
        library: folder of the library.
        tasks: names, separated by commas.
        routers: names, separated by commas.
        as_json: print one JSON document.
        without: options that mean nothing here, by name, with what was given.
        settings: for `lorary.recipes.harness.run_harness`.

    Raises:
        UsageError: if one of them was given, or `--harness` was not.
    """
    from lorary.errors import UsageError

    if not is_asked:
        raise UsageError("--harness-path and --shots go with --harness", found="no --harness")
    if given := [name for name, value in without.items() if value]:
        raise UsageError("tasks of the harness bring their own rows and metrics", found=given, remedy="leave them out")
    from lorary.recipes.harness import run_harness
    from lorary.report.tables import print_harness
    from lorary.route.spec import split_specs

    result = run_harness(library, split_names(tasks) or [], routers=split_specs(routers), **settings)
    if as_json:
        print(json.dumps(result.to_json()))
    else:
        print_harness(result)
