"""`lorary library`: what is in a library, and is it whole."""

import json
from collections.abc import Sequence, Sized
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from lorary.cli.catalogue import add_commands, print_added
from lorary.cli.flags import CommandOptions, OptionValues, split_names, with_options
from lorary.cli.grouped import GroupedCommands
from lorary.cli.options import BASE_HELP, ForceBase, Json, LibraryPath, Output, Route
from lorary.cli.route import route_fields
from lorary.flags import flag
from lorary.recipes.base_options import BaseOptions

library_app = typer.Typer(
    cls=GroupedCommands, no_args_is_help=True, rich_markup_mode=None, help="Look into a library and change it."
)


add_commands(library_app)


@library_app.command("show")
def show(library: LibraryPath, name: Annotated[str, typer.Argument(help="name of the adapter")]) -> None:
    """Print all that is known of one adapter, as JSON."""
    from lorary.library.store import Library

    print(json.dumps(Library.open(library).provenance(name), indent=2))


@library_app.command("add")
def add(
    library: LibraryPath,
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH...", help="PEFT LoRA adapters: folders, folders of several, patterns, hf://..."),
    ] = None,
    listed_in: Annotated[
        str | None, typer.Option("--from", metavar="FILE", help="a file with a path on each line, or a JSON object")
    ] = None,
    check_only: Annotated[bool, typer.Option("--check", help="say what would happen, and write nothing")] = False,
    name: Annotated[str | None, typer.Option(help="name of the one adapter; its folder's by default")] = None,
    base: Annotated[str | None, typer.Option("--base", help=f"{BASE_HELP}; makes the library if there is none")] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", metavar="NAME=TASK,...", help="tasks that an adapter was trained on; may be repeated"),
    ] = None,
    force_base: ForceBase = False,
    as_json: Json = False,
) -> None:
    """Copy PEFT adapters into a library, their files as they are; exit code 1 if one cannot go in."""
    from lorary.recipes.add import run_add

    result = run_add(
        library, paths or (), listed_in=listed_in, name=name, tasks=_parse_tasks(tasks), base=base,
        force_base=force_base, check_only=check_only,
    )  # fmt: skip
    if as_json:
        print(json.dumps(asdict(result)))
    else:
        print_added(result)
    if result.failed:
        raise typer.Exit(1)


def _parse_tasks(texts: Sequence[str] | None) -> dict[str, list[str]]:
    """`NAME=TASK[,TASK...]` each, as tasks by adapter."""
    from lorary.errors import UsageError

    tasks: dict[str, list[str]] = {}
    for text in texts or ():
        name, _, listed = text.partition("=")
        names = split_names(listed)
        if not (name.strip() and names):
            raise UsageError("--tasks must be NAME=TASK, further tasks after commas", found=ascii(text),
                             remedy="for example --tasks my_adapter=sst2,trec")  # fmt: skip
        tasks.setdefault(name.strip(), []).extend(names)
    return tasks


@library_app.command("remove")
def remove(library: LibraryPath, name: Annotated[str, typer.Argument(help="name of the adapter")]) -> None:
    """Remove an adapter from a library."""
    from lorary.library.store import Library

    Library.open(library).remove(name)
    print(f"removed '{name}' from {library}")


@library_app.command("router")
def router(
    library: LibraryPath,
    route: Route = None,
    reset: Annotated[bool, typer.Option("--reset", help="begin from the router of a new library")] = False,
    as_json: Json = False,
) -> None:
    """Show the router for callers who name none, or change it with --route."""
    from lorary.recipes.router import run_router

    settings = run_router(library, route_fields(route), reset=reset)
    if as_json:
        print(json.dumps(settings))
        return
    for key, value in settings.items():
        print(f"{key:<16} {value if isinstance(value, str) else json.dumps(value)}")


@dataclass(frozen=True)
class PrepareCommand:
    """What is prepared, and from what.

    Args:
        tasks: the experts' data: builtin, a .jsonl file, a folder or a data set's id; without it, contrast takes
            prompts that ship with Lorary where experts have no builtin tasks.
        columns: columns of your own data that hold prompt and answer, such as source=question,target=reply.
        mapping: tasks of experts that name none themselves.
        experts: only these experts, by name, separated by commas.
        rows: training rows of each task, at most; 100, or 16 for contrast.
        seed: seed of the rows that are drawn, and of their order.
        features: of the prompts: `hidden` (of the base) or `text` (a sentence encoder).
        steps: optimiser steps of an expert's gates.
    """

    tasks: str = flag("builtin", metavar="TASKS")
    columns: str | None = flag(None, metavar="FIELD=COLUMN,...")
    mapping: str | None = flag(None, option="--map", metavar="NAME=TASK,...")
    experts: tuple[str, ...] | None = None
    rows: int | None = None
    seed: int = 0
    features: str = flag("hidden", methods=("task-predictor", "retrieval"))
    steps: int = flag(100, methods=("phatgoose",))


@library_app.command("prepare")
@with_options
def prepare(
    library: LibraryPath,
    router: Annotated[
        str, typer.Option(help="centroid, phatgoose, contrast, task-predictor, retrieval, or norm to calibrate it")
    ],
    options: Annotated[OptionValues, CommandOptions((PrepareCommand, BaseOptions, Output))],
) -> None:
    """Compute what a router needs beyond weights from the experts' own data; run it again to go on."""
    from lorary.recipes.prepare import run_prepare

    result = run_prepare(library, router, load=BaseOptions(**options[BaseOptions]), **options[PrepareCommand])
    if Output(**options[Output]).as_json:
        print(json.dumps(asdict(result)))
    else:
        source = " (from prompts that ship with Lorary; --tasks takes those of the tasks)" * result.is_from_yardstick
        print(f"{len(result.prepared)} experts prepared, {len(result.kept)} kept: {library}, {result.kind}{source}")


@dataclass(frozen=True)
class TuneCommand:
    """What is tried, and on what.

    Args:
        tasks: the experts' tasks: builtin, a .jsonl file, a folder or a data set's id.
        routers: candidates, separated by commas, with settings of their own in brackets.
        rows: validation rows of each task, at most.
    """

    tasks: str = flag("builtin", metavar="TASKS")
    routers: str | None = None
    rows: int = flag(8, least=1)


@library_app.command("tune")
@with_options
def tune(
    library: LibraryPath,
    options: Annotated[OptionValues, CommandOptions((TuneCommand, BaseOptions, Output))],
) -> None:
    """Choose the default router by the experts' own validation rows, with and without the task's expert."""
    from lorary.evaluate.tune import CANDIDATES
    from lorary.recipes.tune import run_tune
    from lorary.route.spec import split_specs

    command = TuneCommand(**options[TuneCommand])
    routers = CANDIDATES if command.routers is None else split_specs(command.routers)
    load = BaseOptions(**options[BaseOptions])
    tuned = run_tune(library, command.tasks, routers=routers, rows=command.rows, load=load)
    if Output(**options[Output]).as_json:
        print(json.dumps(asdict(tuned)))
        return
    width = max(len(candidate.router) for candidate in tuned.candidates)
    print(f"{'router':<{width}}  known  masked    mean   over {len(tuned.tasks)} tasks, {tuned.rows} rows each at most")
    for candidate in tuned.candidates:
        print(f"{candidate.router:<{width}}  {candidate.known:5.3f}   {candidate.masked:5.3f}   {candidate.mean:5.3f}")
    print(f"default router of {library}: {tuned.candidates[0].router}")


Results = Annotated[bool, typer.Option("--results", help="move the lines of evaluations too")]
URL_HELP = "s3://, gs://, az://, hf://USER/NAME or a folder, with @REF behind it"
RemoteUrl = Annotated[str | None, typer.Argument(metavar="[URL]", help=f"{URL_HELP}; the last one otherwise")]


@library_app.command("push")
def push(
    library: LibraryPath,
    url: RemoteUrl = None,
    results: Results = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="where both sides changed an adapter, this library's goes")
    ] = False,
    public: Annotated[bool, typer.Option("--public", help="a repository that is made on the Hub is public")] = False,
    as_json: Json = False,
) -> None:
    """Send what changed in a library to a remote; what others pushed stays there."""
    from lorary.recipes.push import run_push

    result = run_push(library, url, results=results, overwrite=overwrite, public=public)
    _print_moved(result, as_json, f"{len(result.sent)} adapters sent, {len(result.removed)} removed: {result.url}")


@library_app.command("pull")
def pull(
    library: LibraryPath,
    url: RemoteUrl = None,
    results: Results = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="where both sides changed an adapter, the remote's comes")
    ] = False,
    as_json: Json = False,
) -> None:
    """Bring what changed at a remote into a library; what changed here stays."""
    from lorary.remote.pull import pull_library

    result = pull_library(library, url, results=results, overwrite=overwrite)
    _print_moved(result, as_json, f"{len(result.received)} adapters received, {len(result.removed)} removed: {library}")


@library_app.command("clone")
def clone(
    url: Annotated[str, typer.Argument(metavar="URL", help=URL_HELP)],
    library: Annotated[str, typer.Argument(metavar="LIB", help="a folder that does not exist or is empty")],
    results: Results = False,
    as_json: Json = False,
) -> None:
    """Make a library that is a copy of a remote; run it again to go on."""
    from lorary.remote.clone import clone_library

    result = clone_library(url, library, results=results)
    _print_moved(result, as_json, f"{len(result.received)} adapters received: {library}")


def _print_moved(result: Any, as_json: bool, sentence: str) -> None:
    if as_json:
        print(json.dumps(asdict(result)))
    else:
        moved = f"{result.bytes_sent:,} bytes sent, {result.bytes_received:,} received, {result.requests} requests"
        print(f"{sentence}, snapshot {result.snapshot[:12]}; {moved}")


@library_app.command("snapshot")
def snapshot(
    library: LibraryPath,
    name: Annotated[str | None, typer.Option(help="name of the snapshot; the next free number by default")] = None,
    as_json: Json = False,
) -> None:
    """Keep the state of a library, to go back to; files are linked, not copied."""
    from lorary.library.store import Library

    made = Library.open(library).snapshot(name)
    if as_json:
        print(json.dumps(asdict(made)))
    else:
        print(f"snapshot '{made.name}' of {library}: {len(made.adapters)} adapters, {made.digest[:12]}")


@library_app.command("snapshots")
def snapshots(
    library: LibraryPath,
    remove: Annotated[
        list[str] | None, typer.Option("--remove", metavar="NAME", help="remove this snapshot; may be repeated")
    ] = None,
    collect: Annotated[bool, typer.Option("--collect", help="remove what no snapshot needs")] = False,
    as_json: Json = False,
) -> None:
    """List the snapshots of a library, or remove some and what only they needed."""
    from lorary.library.store import Library
    from lorary.remote.snapshots import remove_snapshots

    opened = Library.open(library)
    removed = remove_snapshots(opened, remove or ()) if remove or collect else 0
    kept = opened.snapshots()
    if as_json:
        print(json.dumps({"snapshots": [asdict(each) for each in kept], "bytes_removed": removed}))
        return
    for each in kept:
        print(f"{each.name:<24} {each.created}  {each.digest[:12]}  {len(each.adapters)} adapters")
    print(f"{len(kept)} snapshots" + f", {removed:,} bytes removed" * bool(remove or collect))


@library_app.command("rollback")
def rollback(
    library: LibraryPath, name: Annotated[str, typer.Argument(help="name of a snapshot")], as_json: Json = False
) -> None:
    """Make adapters and default router what a snapshot holds; what they are now is kept as a snapshot."""
    from lorary.library.store import Library

    done = Library.open(library).rollback(name)
    if as_json:
        print(json.dumps(asdict(done)))
    elif done.before is None:
        print(f"{library} is as in snapshot '{name}' already")
    else:
        print(
            f"{library} is as in snapshot '{name}': {len(done.restored)} adapters restored, {len(done.removed)} removed"
        )
        print(f"undo: lorary library rollback {library} {done.before}")


@library_app.command("repair")
def repair(
    library: LibraryPath,
    source: Annotated[
        str | None, typer.Option("--from", metavar="URL", help="a remote or a library that has whole copies")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="say what would be done, and change nothing")] = False,
    as_json: Json = False,
) -> None:
    """Mend what `verify` finds; what was there before is put aside. Exit code 1 while something is wrong."""
    from lorary.remote.repair import repair_library

    done = repair_library(library, source, check=check)
    if as_json:
        print(json.dumps(asdict(done)))
    else:
        for step in done.steps:
            print(f"{step.part}: {step.action}")
            for problem in step.problems:
                print(f"  {problem}")
        if done.aside is not None:
            print(f"what was there before is in {done.aside}")
        mended = sum(step.is_mended for step in done.steps)
        verb = "would be mended" if check else "mended"
        print(f"{mended} of {len(done.steps)} {verb}, {len(done.problems)} problems" + " now" * check)
    if done.problems:
        raise typer.Exit(1)


@library_app.command("sign")
def sign(
    library: LibraryPath,
    key: Annotated[str, typer.Option(metavar="FILE", help="private key (PEM; P-256, P-384 or P-521)")],
) -> None:
    """Sign library.json and all adapters as they are; needs the extra `signing`."""
    from lorary.library.store import Library

    print(f"signed {library}: {Library.open(library).sign(key)}")


@library_app.command("verify")
def verify(
    library: LibraryPath,
    key: Annotated[
        str | None, typer.Option(metavar="FILE", help="public key of whoever signed it: check the signature, too")
    ] = None,
    signature: Annotated[
        str | None, typer.Option(metavar="FILE", help="the signature; the library's own by default")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check every file of a library against its recorded hash; exit code 1 if something is wrong."""
    from lorary.library.store import Library

    opened = Library.open(library)
    problems = opened.verify(key=key, signature=signature)
    if as_json:
        print(json.dumps({"ok": not problems, "problems": [asdict(problem) for problem in problems]}))
    else:
        for problem in problems:
            lines = f"{problem.adapter}: {problem.rule}\n  found: {problem.found}\n  remedy: {problem.remedy}"
            print(lines)
        print(f"{_number_of_adapters(opened)} adapters, {len(problems)} problems")
    if problems:
        raise typer.Exit(1)


def _number_of_adapters(library: Sized) -> int:
    from lorary.errors import LibraryError

    try:
        return len(library)
    except LibraryError:  # the folder of the adapters is a link, say, which is among the problems
        return 0
