"""Options that several commands share."""

from typing import Annotated

import typer

BASE_HELP = "base model: embedded, a transformers folder, a .gguf file or a Hub id"

Json = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")]
LibraryPath = Annotated[str, typer.Argument(metavar="LIB", help="folder of the library")]
TasksReference = Annotated[
    str, typer.Argument(metavar="TASKS", help="builtin, a .jsonl file, a folder of them, a suite or a data set's id")
]
TaskNames = Annotated[str | None, typer.Option("--tasks", help="only these tasks, by name, separated by commas")]
Router = Annotated[str | None, typer.Option(help="arrow, contrast, ... or base; the library's default otherwise")]
TopK = Annotated[int | None, typer.Option("--top-k", help="experts per token and layer")]
RouterTemperature = Annotated[float | None, typer.Option("--temperature", help="divides the router's scores")]
MixOption = Annotated[str | None, typer.Option("--mix", help="outputs or factors")]
Route = Annotated[
    list[str] | None,
    typer.Option(
        "--route", metavar="FIELD=VALUE", help="any setting of the router, such as top_p=0.9; may be repeated"
    ),
]
Template = Annotated[str | None, typer.Option(help="plain or chat")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps, ...")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, ...")]
OptionalBase = Annotated[str | None, typer.Option("--base", help=f"{BASE_HELP}; the library's own by default")]
ForceBase = Annotated[bool, typer.Option("--force-base", help="accept unrelated weights of the same shapes")]


def split_names(names: str | None) -> list[str] | None:
    """`a,b` as a list; None stays None."""
    return None if names is None else [name.strip() for name in names.split(",") if name.strip()]
