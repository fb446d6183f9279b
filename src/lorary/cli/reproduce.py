"""`lorary reproduce`: parse, call one recipe, say where the report lies."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from lorary.cli.flags import split_names
from lorary.cli.options import Json

if TYPE_CHECKING:
    from lorary.recipes.reproduce import ReproduceResult


def reproduce(
    study: Annotated[
        str,
        typer.Argument(metavar="STUDY", help="builtin-quick, suite-cpu, paper-phi2, paper-mistral, or a YAML file"),
    ],
    out: Annotated[str | None, typer.Option(help="folder of the study; one of its name by default")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", envvar="LORARY_TASKS", help="tasks of a study that leaves their place open"),
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="only these: build:NAME, a kind (build, evaluate, ...) or report")
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="the last stage to run")] = None,
    time_budget: Annotated[
        float | None, typer.Option(metavar="MINUTES", help="begin no stage, step or cell after that long")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what it takes, offline, and write nothing")] = False,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ...; the study's own by default")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, ...; the study's own by default")] = None,
    as_json: Json = False,
) -> None:
    """Run a study stage by stage and write its report. Run it again to go on: what is done is not done again."""
    from lorary.errors import UsageError
    from lorary.recipes.reproduce import StageChoice, run_dry_run, run_reproduce
    from lorary.study.dry_run import dry_run_text

    if time_budget is not None and not time_budget >= 0:
        raise UsageError("--time-budget must be at least 0 minutes", found=time_budget)
    names = split_names(only)
    choice = StageChoice(None if names is None else tuple(names), until)
    if dry_run:
        planned = run_dry_run(study, out, choice=choice, tasks=tasks)
        print(json.dumps(planned) if as_json else dry_run_text(planned))
        return
    result = run_reproduce(
        study,
        out,
        choice=choice,
        tasks=tasks,
        time_budget_s=None if time_budget is None else 60 * time_budget,
        device=device,
        dtype=dtype,
    )
    if as_json:
        print(json.dumps(result.document))
    else:
        _print(result)
    if result.failed:
        raise typer.Exit(1)


def _print(result: "ReproduceResult") -> None:
    for answer in result.document["answers"]:
        print(answer["ask"])
        for line in answer["lines"]:
            print(f"  {line}")
        if answer["unfinished"]:
            print(f"  unfinished: {', '.join(answer['unfinished'])}")
    for name, state in result.stages.items():
        if state not in ("done", "skipped"):
            print(f"{state}: {name}")
    print(f"report: {result.report}")
