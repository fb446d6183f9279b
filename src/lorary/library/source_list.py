"""A file that lists adapters to add: a path or a URL on each line, or a JSON object with a name and tasks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorary.errors import UsageError
from lorary.library.listing import check_path
from lorary.reading import parse_json, read_regular

_KEYS = ("path", "name", "tasks")
_EXAMPLE = '{"path": "runs/a", "name": "sst2", "tasks": ["sst2"]}'


@dataclass(frozen=True)
class ListedSource:
    """A line of such a file.

    Args:
        path: a folder, a pattern or a URL.
        name: of the one adapter there; its folder's where None.
        tasks: that it was trained on; what its records say where None.
    """

    path: str
    name: str | None = None
    tasks: Sequence[str] | None = None


def read_source_list(path: str | Path) -> list[ListedSource]:
    """The sources that a file lists; empty lines, and those that begin with #, are passed over.

    Args:
        path: of the file, in UTF-8.

    Raises:
        UsageError: if the file cannot be read, lists nothing, or a line is neither a path nor such an object.
    """
    check_path(path, "a list of adapters")
    try:
        text = read_regular(Path(path)).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        found = getattr(error, "strerror", None) or error
        raise UsageError(f"{path} must be a readable list of adapters", found=found) from error
    sources = [
        _source(line.strip(), f"{path}, line {number}")
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not sources:
        raise UsageError(f"{path} must list adapters, one on each line", found="none", remedy=f"a path, or {_EXAMPLE}")
    return sources


def _source(line: str, where: str) -> ListedSource:
    if not line.startswith("{"):
        return ListedSource(line)
    try:
        entry = parse_json(line.encode())
    except ValueError as error:
        raise UsageError(f"{where} must be a path or one JSON object", found=error, remedy=_EXAMPLE) from error
    name, tasks = entry.get("name"), entry.get("tasks")
    tasks = [tasks] if isinstance(tasks, str) else tasks
    is_right = (
        isinstance(entry.get("path"), str)
        and entry["path"].strip()
        and not set(entry) - set(_KEYS)
        and isinstance(name, str | None)
        and (tasks is None or (isinstance(tasks, list) and all(isinstance(task, str) for task in tasks)))
    )
    if not is_right:
        raise UsageError(f"{where} must have a path, and may have a name and tasks", found=line[:200], remedy=_EXAMPLE)
    return ListedSource(entry["path"], name, tasks)
