"""Arguments and options that several commands share."""

from dataclasses import dataclass
from typing import Annotated

import typer

from lorary.flags import flag

BASE_HELP = "base model: embedded, a transformers folder, a .gguf file or a Hub id"

Json = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")]
LibraryPath = Annotated[str, typer.Argument(metavar="LIB", help="folder of the library")]
TasksReference = Annotated[
    str, typer.Argument(metavar="TASKS", help="builtin, a .jsonl file, a folder of them, a suite or a data set's id")
]
Route = Annotated[
    list[str] | None,
    typer.Option(
        "--route", metavar="FIELD=VALUE", help="any setting of the router, such as top_p=0.9; may be repeated"
    ),
]
ForceBase = Annotated[bool, typer.Option("--force-base", help="accept unrelated weights of the same shapes")]


@dataclass(frozen=True)
class RouterChoice:
    """Who answers: a router, or named experts.

    Args:
        router: `arrow`, `contrast`, ... or `base`; the library's default otherwise.
        experts: use these experts, separated by commas, and no router.
    """

    router: str | None = None
    experts: tuple[str, ...] | None = None


@dataclass(frozen=True)
class RouterFields:
    """Settings of a router.

    Args:
        top_k: router: experts per token and layer.
        temperature: router: divides its scores.
        mix: router: experts are mixed by `outputs` or `factors`.
        route: router: any setting of it, such as top_p=0.9; may be repeated.
    """

    top_k: int | None = None
    temperature: float | None = None
    mix: str | None = None
    route: tuple[str, ...] | None = flag(None, metavar="FIELD=VALUE", is_repeated=True)


@dataclass(frozen=True)
class Preset:
    """A named set of settings.

    Args:
        preset: `default` or `paper-2024`; options beside it win.
    """

    preset: str = "default"


@dataclass(frozen=True)
class Output:
    """How a command reports.

    Args:
        as_json: print one JSON document on stdout.
    """

    as_json: bool = flag(False, option="--json")
