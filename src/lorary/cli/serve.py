"""`lorary serve`: a server over a library, and the decisions that one made."""

import json
import os
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from lorary.cli.flags import CommandOptions, OptionValues, with_options
from lorary.cli.grouped import GroupedCommands
from lorary.cli.options import Json, LibraryPath, RouterChoice, RouterFields
from lorary.cli.route import route_fields
from lorary.errors import UsageError
from lorary.flags import option_of
from lorary.recipes.base_options import BaseOptions
from lorary.serve.settings import ServeSettings
from lorary.serve.upstream_settings import UpstreamSettings

TOKEN, ADMIN_TOKEN = "LORARY_TOKEN", "LORARY_ADMIN_TOKEN"


class ServeCommands(GroupedCommands):
    """`lorary serve LIB` serves; `lorary serve log` and what else has a name here are commands of their own."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._serve = self.commands.pop("LIB")

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The context of the command that is meant."""
        if args and args[0] in self.commands:
            return super().make_context(info_name, args, parent, **extra)
        return self._serve.make_context(info_name, args, parent, **extra)


serve_app = typer.Typer(
    cls=ServeCommands, rich_markup_mode=None, help="Serve a library as an OpenAI-compatible server; or show its log."
)


@serve_app.command("LIB")
@with_options
def serve(
    library: LibraryPath,
    options: Annotated[
        OptionValues, CommandOptions((ServeSettings, RouterChoice, RouterFields, BaseOptions, UpstreamSettings))
    ],
) -> None:
    """Serve a library as an OpenAI-compatible server, until a signal ends it.

    `lorary serve log FILE` shows the decisions that a server wrote with --log.
    """
    from lorary.recipes.serve import run_serve

    given = dict(options[ServeSettings])
    for field, variable in (("token", TOKEN), ("admin_token", ADMIN_TOKEN)):
        if field not in given and os.environ.get(variable):
            given[field] = os.environ[variable]
    run_serve(
        library,
        ServeSettings(**given),
        ready=_say_ready,
        load=BaseOptions(**options[BaseOptions]),
        upstream=_upstream(options[UpstreamSettings]),
        **route_fields(**options[RouterChoice], **options[RouterFields]),
    )


def _upstream(given: Mapping[str, Any]) -> UpstreamSettings | None:
    """The server behind ours, where one is named; its token is in a variable, which no list of processes shows."""
    if not given:
        return None
    if "url" not in given:
        option = option_of(UpstreamSettings, next(iter(given)))
        raise UsageError(f"{option} goes with --upstream URL", found="no --upstream")
    variable = given.get("token")
    if variable is None:
        return UpstreamSettings(**given)
    if not os.environ.get(variable):
        raise UsageError("--upstream-token must name a variable that holds the token", found=f"{variable} is not set")
    return UpstreamSettings(**{**given, "token": os.environ[variable]})


def _say_ready(address: str, name: str) -> None:
    print(f"serving {name} at {address}", flush=True)


@serve_app.command("log")
def log(
    file: Annotated[str, typer.Argument(metavar="FILE", help="file that `lorary serve --log` wrote")],
    decision_id: Annotated[str | None, typer.Option("--id", help="show this decision alone")] = None,
    last: Annotated[int | None, typer.Option(min=1, help="show so many from the end; all by default")] = None,
    as_json: Json = False,
) -> None:
    """Show decisions again, without a model."""
    from lorary.recipes.serve_log import run_serve_log

    shown = run_serve_log(file, decision_id=decision_id, last=last)
    if as_json:
        print(json.dumps({"decisions": shown.entries, "usage": shown.usage}))
        return
    for entry in shown.entries:
        kind = "shadow  " if entry["kind"] == "shadow" else ""
        print(f"{entry['id']}  {kind}{entry['sentence']}")
    usage = shown.usage
    experts = ", ".join(f"{name} {number}" for name, number in usage["experts"].items()) or "none"
    print(f"{usage['requests']} requests, {usage['fallback']} without an expert that fits; experts: {experts}")
    if shadow := usage["shadow"]:
        print(f"shadow {shadow['router']}: as answered in {shadow['agree']} of {shadow['requests']}")
