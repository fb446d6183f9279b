"""`lorary evaluate`: routers of one or more libraries, scored on tasks beside the base model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lorary.cli.flags import CommandOptions, OptionValues, with_options
from lorary.cli.harness import evaluate_harness
from lorary.cli.options import LibraryPath, Output, RouterFields, TasksReference
from lorary.cli.route import route_fields
from lorary.evaluate.settings import EvaluateSettings, HarnessSettings
from lorary.flags import flag
from lorary.recipes.base_options import BaseOptions


@dataclass(frozen=True)
class EvaluateCommand:
    """What is evaluated, and where the results go.

    Args:
        also: another library over the same base; may be repeated.
        names: only these tasks, by name, separated by commas; all with test rows by default.
        columns: columns of your own data that hold prompt and answer, such as source=question,target=reply.
        report: write a page that opens offline.
        csv: write one line a cell.
        markdown: write tables: means, differences, gap, routing, base guard, failures, every task.
    """

    also: tuple[str, ...] = flag((), metavar="LIB", is_repeated=True)
    names: tuple[str, ...] | None = flag(None, option="--tasks")
    columns: str | None = flag(None, metavar="FIELD=COLUMN,...")
    report: str | None = flag(None, metavar="FILE.html")
    csv: str | None = flag(None, metavar="FILE.csv")
    markdown: str | None = flag(None, metavar="FILE.md")


@with_options
def evaluate(
    library: LibraryPath,
    tasks: TasksReference,
    options: Annotated[
        OptionValues,
        CommandOptions(
            (EvaluateCommand, EvaluateSettings, RouterFields, BaseOptions, HarnessSettings, Output),
            omit={EvaluateSettings: ("top_k", "temperature", "mix"), HarnessSettings: ("rows",)},
            defaults={
                "template": "that of the experts",
                "harness": "",
                **dict.fromkeys(("top_k", "temperature", "mix"), "the first library's"),
            },
        ),
    ],
) -> None:
    """Score routers on tasks, beside the base model; finished cells are not computed again."""
    if options[HarnessSettings]:
        evaluate_harness(library, tasks, options)
        return
    from lorary.library.store import Library
    from lorary.recipes.evaluate import evaluate as evaluate_routers
    from lorary.report.evaluation_page import report_of, write_report
    from lorary.report.export import evaluation_csv, evaluation_markdown
    from lorary.report.shell import check_writable, write_page
    from lorary.report.tables import print_evaluation

    command = EvaluateCommand(**options[EvaluateCommand])
    if command.report:
        check_writable(Path(command.report))
    for file in filter(None, (command.csv, command.markdown)):
        check_writable(Path(file))
    evaluation = evaluate_routers(
        library,
        tasks,
        also=command.also,
        names=command.names,
        columns=command.columns,
        **options[EvaluateSettings],
        **options[BaseOptions],
        **route_fields(**options[RouterFields]),
    )
    if command.report:
        libraries = [Library.open(path) for path in (library, *command.also)]
        write_report(Path(command.report), report_of(evaluation, libraries))
    if command.csv:
        write_page(Path(command.csv), evaluation_csv(evaluation))
    if command.markdown:
        write_page(Path(command.markdown), evaluation_markdown(evaluation))
    if Output(**options[Output]).as_json:
        print(json.dumps(evaluation.to_json(), allow_nan=False))
    else:
        print_evaluation(evaluation)
        for kind, path in (("report", command.report), ("cells", command.csv), ("tables", command.markdown)):
            if path:
                print(f"{kind}: {path}")
    evaluation.check()
