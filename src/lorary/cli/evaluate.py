"""`lorary evaluate`: routers of one or more libraries, scored on tasks beside the base model."""

import json
from pathlib import Path
from typing import Annotated

import typer

from lorary.cli.harness import Harness, HarnessPath, Shots, evaluate_harness
from lorary.cli.options import (
    Device,
    Dtype,
    ForceBase,
    Json,
    LibraryPath,
    MixOption,
    OptionalBase,
    Route,
    RouterTemperature,
    TaskNames,
    TasksReference,
    Template,
    TopK,
    split_names,
)
from lorary.cli.route import route_fields

ORACLE_ROWS, ROUTING_ROWS, MAX_LENGTH = 16, 8, 1024
ROUTERS_HELP = "separated by commas, with settings of their own in brackets: arrow[top_k=2], experts[a+b], oracle"


def evaluate(
    library: LibraryPath,
    tasks: TasksReference,
    also: Annotated[
        list[str] | None, typer.Option(metavar="LIB", help="another library over the same base; may be repeated")
    ] = None,
    routers: Annotated[str, typer.Option(help=ROUTERS_HELP)] = "base,uniform,arrow,oracle",
    names: TaskNames = None,
    rows: Annotated[int, typer.Option(help="test rows per task, at most")] = 100,
    oracle_rows: Annotated[
        int, typer.Option(help="rows on which the oracle of a held-out task is chosen")
    ] = ORACLE_ROWS,
    routing_rows: Annotated[int, typer.Option(help="rows per task whose routing is traced; 0 for none")] = ROUTING_ROWS,
    top_k: TopK = None,
    temperature: RouterTemperature = None,
    mix: MixOption = None,
    route: Route = None,
    template: Template = None,
    max_length: Annotated[int, typer.Option(help="tokens of a row; longer prompts lose their start")] = MAX_LENGTH,
    raw: Annotated[bool, typer.Option("--raw", help="rank options by summed log-likelihood, not per token")] = False,
    allow_code: Annotated[bool, typer.Option("--allow-code", help="run generated programs, in a sandbox")] = False,
    unsafe_code: Annotated[
        bool, typer.Option("--unsafe-code", help="with --allow-code: run them even where nothing isolates them")
    ] = False,
    base: OptionalBase = None,
    force_base: ForceBase = False,
    report: Annotated[str | None, typer.Option(metavar="FILE.html", help="write a page with the results")] = None,
    csv: Annotated[str | None, typer.Option("--csv", metavar="FILE.csv", help="write the cells as CSV")] = None,
    markdown: Annotated[str | None, typer.Option(metavar="FILE.md", help="write tables as Markdown")] = None,
    harness: Harness = False,
    harness_path: HarnessPath = None,
    shots: Shots = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Score routers on tasks, beside the base model; finished cells are not computed again."""
    asked = route_fields(route, top_k=top_k, temperature=temperature, mix=mix)
    if harness or harness_path is not None or shots is not None:
        evaluate_harness(
            harness, library, tasks, routers=routers, include_path=harness_path, rows=rows, shots=shots,
            template=template, route=asked, base=base, force_base=force_base, device=device, dtype=dtype,
            as_json=as_json,
            without={
                "--tasks": names, "--also": also, "--raw": raw, "--allow-code": allow_code, "--report": report,
                "--csv": csv, "--markdown": markdown, "--unsafe-code": unsafe_code,
                "--max-length": max_length != MAX_LENGTH, "--routing-rows": routing_rows != ROUTING_ROWS,
                "--oracle-rows": oracle_rows != ORACLE_ROWS,
            },
        )  # fmt: skip
        return
    from lorary.library.store import Library
    from lorary.recipes.evaluate import run_evaluate
    from lorary.report.evaluation_page import report_of, write_report
    from lorary.report.export import evaluation_csv, evaluation_markdown
    from lorary.report.shell import check_report, check_writable, write_page
    from lorary.report.tables import print_evaluation
    from lorary.route.spec import split_specs

    if report:
        check_report(Path(report))
    for file in filter(None, (csv, markdown)):
        check_writable(Path(file))
    evaluation = run_evaluate(
        library,
        tasks,
        also=also or (),
        routers=split_specs(routers),
        names=split_names(names),
        base=base,
        force_base=force_base,
        device=device,
        dtype=dtype,
        rows=rows,
        oracle_rows=oracle_rows,
        routing_rows=routing_rows,
        route=asked,
        template=template,
        max_length=max_length,
        raw=raw,
        allow_code=allow_code,
        unsafe_code=unsafe_code,
    )
    if report:
        write_report(Path(report), report_of(evaluation, [Library.open(path) for path in (library, *(also or ()))]))
    if csv:
        write_page(Path(csv), evaluation_csv(evaluation))
    if markdown:
        write_page(Path(markdown), evaluation_markdown(evaluation))
    if as_json:
        print(json.dumps(evaluation.to_json(), allow_nan=False))
    else:
        print_evaluation(evaluation)
        for kind, where in (("report", report), ("cells", csv), ("tables", markdown)):
            if where:
                print(f"{kind}: {where}")
    evaluation.check()
