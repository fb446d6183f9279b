"""The commands. Each parses its options, calls one recipe and says where the result lies.

Recipes are imported inside the commands: torch and transformers take seconds, and `lorary --help` needs neither.
"""

import json
from typing import Annotated

import typer

from lorary.cli.adapt import adapt
from lorary.cli.build import build
from lorary.cli.cluster import cluster
from lorary.cli.evaluate import evaluate
from lorary.cli.explain import explain
from lorary.cli.library import library_app
from lorary.cli.merge import merge
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
from lorary.cli.reproduce import reproduce
from lorary.cli.route import route_fields
from lorary.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="A library of LoRA experts over one frozen base model, routed token by token as one model.",
)
app.add_typer(library_app, name="library")


def _version(wanted: bool | None) -> None:
    if wanted:
        print(f"lorary {__version__}")
        raise typer.Exit


@app.callback()
def _lorary(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error (any command)")] = False,
) -> None: ...


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="folder for the library, the results and the report")] = "demo",
    full: Annotated[bool, typer.Option("--full", help="all builtin tasks and layers, not the quick selection")] = False,
    as_json: Json = False,
) -> None:
    """Build, route and evaluate a library on the embedded base model, and write a report."""
    from lorary.recipes.demo import run_demo

    result = run_demo(out, full=full, quiet=as_json)
    if as_json:
        print(json.dumps(result.to_json()))
    result.evaluation.check()


app.command()(build)
app.command()(adapt)
app.command()(merge)
app.command()(cluster)
app.command()(explain)
app.command()(evaluate)
app.command()(reproduce)


@app.command()
def generate(
    library: LibraryPath,
    prompt: Annotated[str, typer.Option(help="text to answer")],
    router: Router = None,
    experts: Annotated[str | None, typer.Option(help="use these experts, separated by commas, and no router")] = None,
    top_k: TopK = None,
    temperature: RouterTemperature = None,
    mix: MixOption = None,
    route: Route = None,
    template: Template = None,
    max_new_tokens: Annotated[int, typer.Option(help="most tokens of the answer")] = 64,
    sample: Annotated[bool, typer.Option("--sample", help="sample instead of taking the likeliest token")] = False,
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
    stream: Annotated[bool, typer.Option("--stream", help="print the answer while it is made")] = False,
    base: OptionalBase = None,
    force_base: ForceBase = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Answer a prompt with the routed library."""
    from dataclasses import asdict

    from lorary.recipes.generate import run_generate

    asked = route_fields(
        route, router=router, experts=split_names(experts), top_k=top_k, temperature=temperature, mix=mix
    )
    answer = run_generate(
        library,
        prompt,
        template=template,
        max_new_tokens=max_new_tokens,
        sample=sample,
        seed=seed,
        stream=stream and not as_json,
        base=base,
        force_base=force_base,
        device=device,
        dtype=dtype,
        **asked,
    )
    if as_json:
        print(json.dumps(asdict(answer)))
    elif not stream:
        print(answer.text)
