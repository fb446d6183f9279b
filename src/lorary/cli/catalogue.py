"""`lorary library ls`, and what else looks through many adapters and writes down about them."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from lorary.cli.options import Json, LibraryPath

Name = Annotated[str, typer.Argument(help="name of the adapter")]

# Characters of a cell that holds what may be long.
MOST_CELL = 40


def ls(
    library: LibraryPath,
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter", metavar="KEY=PATTERN", help="only those that fit, as rank>=8 or task=ss*; may be repeated"
        ),
    ] = None,
    search: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="only those that have this in name, tasks, targets, notes, origin"),
    ] = None,
    tags: Annotated[list[str] | None, typer.Option("--tag", help="only those with this tag; may be repeated")] = None,
    sort: Annotated[str | None, typer.Option(metavar="KEY", help="order by rank, size, date, task, ...")] = None,
    is_reversed: Annotated[bool, typer.Option("--reverse", help="the other way round")] = False,
    find_duplicates: Annotated[
        bool, typer.Option("--duplicates", help="instead, those whose weights or direction an earlier one has")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the adapters of a library."""
    from lorary.library.catalogue import select
    from lorary.library.listing import list_library

    if find_duplicates:
        _refuse_beside_duplicates(filters, search, tags, sort, is_reversed)
        _print_duplicates(library, as_json)
        return
    adapters, problems = list_library(library)
    chosen = select(adapters, filters=filters or (), search=search, tags=tags or (), sort=sort, is_reversed=is_reversed)
    if as_json:
        print(json.dumps(chosen))
    else:
        _print_adapters(chosen)
        unread = f", {len(problems)} more that cannot be read" if problems else ""
        number = f"{len(chosen)} of {len(adapters)}" if filters or search or tags else str(len(adapters))
        print(f"{number} adapters{unread}")
    for name, error in problems.items():
        print(f"error: adapter '{name}': {error!s}", file=sys.stderr)
    if problems:
        raise typer.Exit(1)


def _print_adapters(adapters: Sequence[Mapping[str, Any]]) -> None:
    """A table: columns as wide as what is in them; tasks come last, since they may be many."""
    from lorary.library.listing import targets_in_short

    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "name": lambda adapter: adapter["name"],
        "rank": lambda adapter: str(adapter["rank"]),
        "parameters": lambda adapter: f"{adapter['num_parameters']:,}",
        "size": lambda adapter: _in_bytes(adapter["bytes"]),
        "changed": lambda adapter: adapter["changed"][:10],
        "hash": lambda adapter: adapter["hash"][:12],
        "targets": lambda adapter: "-" if adapter["targets"] is None else _cut(targets_in_short(adapter["targets"])),
        "origin": lambda adapter: _cut(adapter["origin"] or "-"),
        "tags": lambda adapter: _cut(" ".join(adapter["tags"])),
        "note": lambda adapter: _cut(" ".join(adapter["note"].split())),
        "tasks": lambda adapter: ", ".join(adapter["tasks"]),
    }
    cells = [[heading, *map(cell, adapters)] for heading, cell in columns.items()]
    # What nobody has written down takes no room.
    shown = [column for column in cells if column[0] not in ("tags", "note") or any(column[1:])]
    widths = [max(map(len, column)) for column in shown]
    for line in zip(*shown, strict=True):
        padded = [
            cell.rjust(width) if column[0] in ("rank", "parameters", "size") else cell.ljust(width)
            for cell, column, width in zip(line, shown, widths, strict=True)
        ]
        print("  ".join(padded).rstrip())


def _in_bytes(number: int) -> str:
    """A number of bytes with three digits or so.

    >>> _in_bytes(990), _in_bytes(1_540), _in_bytes(25_000_000)
    ('990 B', '1.5 kB', '25.0 MB')
    """
    size, unit = float(number), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{number} B" if unit == "B" else f"{size:.1f} {unit}"


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CELL else f"{text[: MOST_CELL - 1]}…"


def _refuse_beside_duplicates(*options: object) -> None:
    from lorary.errors import UsageError

    if any(options):
        raise UsageError(
            "--duplicates stands by itself",
            found="an option that chooses or orders adapters beside it",
            remedy="leave that out",
        )


def _print_duplicates(library: str, as_json: bool) -> None:
    from lorary.library.store import Library

    found = Library.open(library).duplicates()
    if as_json:
        print(json.dumps([asdict(duplicate) for duplicate in found]))
        return
    for duplicate in found:
        print(f"{duplicate.name}  {in_words(duplicate)}")
    same = sum(duplicate.is_same for duplicate in found)
    print(f"{same} adapters with the weights of an earlier one, {len(found) - same} with nearly its direction")


def in_words(duplicate: Any) -> str:
    """What an adapter is to the one that it is like."""
    if duplicate.is_same:
        return f"same weights as '{duplicate.other}'"
    return f"nearly the direction of '{duplicate.other}', cosine {duplicate.cosine:.4f}"


def print_added(result: Any) -> None:
    """What `lorary library add` did, or would do."""
    duplicates = {duplicate.name: in_words(duplicate) for duplicate in result.duplicates}
    for adapter in result.checked:
        like = f"; {duplicates[adapter.name]}" if adapter.name in duplicates else ""
        print(f"{adapter.name}: rank {adapter.rank}, {adapter.num_parameters:,} parameters, {adapter.targets}{like}")
    for name in result.added:
        if name in duplicates:
            print(f"{name}: {duplicates[name]}")
    if result.uncompared:
        print(
            f"not compared with {result.uncompared} adapters: lorary library ls {result.library} --duplicates does it"
        )
    if result.checked or not result.added:
        print(f"{len(result.checked)} adapters would be added, {len(result.failed)} not: {result.library}")
    elif len(result.added) == 1 and not result.failed:
        print(f"added '{result.added[0]}' to {result.library}")
    else:
        print(f"{len(result.added)} adapters added, {len(result.failed)} not: {result.library}")


def nearest(
    library: LibraryPath,
    name: Name,
    k: Annotated[int, typer.Option("--k", min=1, help="how many")] = 5,
    as_json: Json = False,
) -> None:
    """Name the adapters that are most like one, by the cosine between their updates."""
    from lorary.library.store import Library

    found = Library.open(library).nearest(name, k)
    if as_json:
        print(json.dumps([{"name": other, "cosine": cosine} for other, cosine in found]))
        return
    width = max((len(other) for other, _ in found), default=0)
    for other, cosine in found:
        print(f"{other:<{width}}  {cosine:+.4f}")
    if not found:
        print(f"no adapter is like '{name}': it computes nothing, or is alone")


def tag(
    library: LibraryPath,
    name: Name,
    tags: Annotated[
        list[str] | None, typer.Argument(metavar="[+TAG|-TAG]...", help="tags to add and to remove")
    ] = None,
    as_json: Json = False,
) -> None:
    """Add tags to an adapter (+TAG) and remove others (-TAG); show them where none is given."""
    from lorary.errors import UsageError
    from lorary.library.listing import tags_in
    from lorary.library.store import Library

    opened = Library.open(library)
    if wrong := [text for text in tags or () if text[:1] not in ("+", "-")]:
        raise UsageError(
            "a tag must have + before it to be added, or - to be removed",
            found=ascii(wrong[0][:200]),
            remedy=f"for example +{wrong[0][:64]}",
        )
    if tags:
        add, remove = ([text[1:] for text in tags if text[0] == sign] for sign in "+-")
        current = opened.tag(name, add, remove)
    else:
        current = tags_in(opened.provenance(name))
    print(json.dumps(current) if as_json else " ".join(current) or f"no tags on '{name}'")


def note(
    library: LibraryPath,
    name: Name,
    text: Annotated[str | None, typer.Argument(help="the note; an empty one takes it away")] = None,
) -> None:
    """Write the note on an adapter, or show it where no text is given."""
    from lorary.library.store import Library

    opened = Library.open(library)
    if text is None:
        recorded = opened.provenance(name).get("note")
        print(recorded if isinstance(recorded, str) else f"no note on '{name}'")
        return
    opened.note(name, text)
    print(f"note on '{name}' {'written' if text.strip() else 'removed'}")


def rename(
    library: LibraryPath, old: Annotated[str, typer.Argument(help="its name")],
    new: Annotated[str, typer.Argument(help="the name it gets")],
) -> None:  # fmt: skip
    """Give an adapter another name; what was prepared of it alone follows."""
    from lorary.library.store import Library

    followed, left = Library.open(library).rename(old, new)
    print(f"'{old}' is '{new}' now: {library}")
    for kinds, sentence in ((followed, "followed"), (left, "will be computed again when asked for")):
        if kinds:
            print(f"{', '.join(kinds)}: {sentence}")


def add_commands(app: typer.Typer) -> None:
    """Put these commands into the group of those of a library."""
    app.command("ls")(ls)
    app.command("nearest")(nearest)
    # `-TAG` is no option, and begins like -h where TAG does.
    app.command("tag", context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]})(tag)
    app.command("note")(note)
    app.command("rename")(rename)
