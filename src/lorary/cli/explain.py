"""`lorary explain`: which experts a prompt meets, and what they are worth to its answer."""

import json
from typing import Annotated

import typer

from lorary.cli.options import (
    Device,
    Dtype,
    ForceBase,
    Json,
    LibraryPath,
    MixOption,
    OptionalBase,
    Route,
    Router,
    RouterTemperature,
    Template,
    TopK,
    split_names,
)
from lorary.cli.route import route_fields


def explain(
    library: LibraryPath,
    prompt: Annotated[str | None, typer.Option(help="text to explain")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE.jsonl", help='one {"prompt": ..., "answer": ...} a line; answers optional'),
    ] = None,
    answer: Annotated[str | None, typer.Option(help="its answer; the router's own greedy one by default")] = None,
    router: Router = None,
    experts: Annotated[str | None, typer.Option(help="use these experts, separated by commas, and no router")] = None,
    against: Annotated[
        str | None, typer.Option(metavar="ROUTER", help="compare with the choices of this router")
    ] = None,
    without: Annotated[
        str | None, typer.Option(metavar="EXPERT", help="take these out, one at a time; the most used by default")
    ] = None,
    most: Annotated[int, typer.Option(help="how many of the most used experts to take out")] = 8,
    top_k: TopK = None,
    temperature: RouterTemperature = None,
    mix: MixOption = None,
    route: Route = None,
    template: Template = None,
    max_new_tokens: Annotated[int, typer.Option(help="most tokens of an answer that is not given")] = 32,
    base: OptionalBase = None,
    force_base: ForceBase = False,
    report: Annotated[str | None, typer.Option(metavar="FILE.html", help="write a page with all of it")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Show how prompts are routed: which experts, where, how surely, and what the answer owes them."""
    from pathlib import Path

    from lorary.errors import UsageError
    from lorary.evaluate.explain_trace import Prompt, read_prompts
    from lorary.recipes.explain import run_explain
    from lorary.report.explain import write_explanation
    from lorary.report.explain_text import print_explanation
    from lorary.report.explanation_json import explanation_json
    from lorary.report.shell import check_writable

    if (prompt is None) == (prompts is None):
        raise UsageError(
            "explain takes --prompt TEXT or --prompts FILE, one of them", found="both" if prompt else "none"
        )
    if answer is not None and prompts is not None:
        raise UsageError("--answer goes with --prompt", found="--prompts", remedy="give answers in the file")
    if report:
        check_writable(Path(report))
    wanted = [Prompt(prompt, answer)] if prompt is not None else read_prompts(str(prompts))
    asked = route_fields(
        route, router=router, experts=split_names(experts), top_k=top_k, temperature=temperature, mix=mix
    )
    found = run_explain(
        library,
        wanted,
        against=against,
        without=split_names(without),
        most=most,
        template=template,
        max_new_tokens=max_new_tokens,
        base=base,
        force_base=force_base,
        device=device,
        dtype=dtype,
        **asked,
    )
    if report:
        write_explanation(Path(report), found)
    if as_json:
        print(json.dumps(explanation_json(found), allow_nan=False))
        return
    print_explanation(found)
    if report:
        print(f"report: {report}")
