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
from lorary.cli.explore import explore
from lorary.cli.export import export
from lorary.cli.generate import generate
from lorary.cli.grouped import GroupedCommands
from lorary.cli.library import library_app
from lorary.cli.merge import merge
from lorary.cli.options import Json
from lorary.cli.reproduce import reproduce
from lorary.cli.serve import serve_app
from lorary.cli.which import which
from lorary.version import __version__

app = typer.Typer(
    cls=GroupedCommands,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="A library of LoRA experts over one frozen base model, routed token by token as one model.",
)
app.add_typer(library_app, name="library")
app.add_typer(serve_app, name="serve")


def _version(value: bool | None) -> None:
    if value:
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
    from lorary.display import Display

    Display().say("0/4 loading PyTorch")  # which takes some seconds
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
app.command()(explore)
app.command()(evaluate)
app.command()(reproduce)


app.command()(generate)
app.command()(which)
app.command()(export)
