"""The manifest of a task folder: which tasks there are, in which files, and how they are scored."""

import codecs
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lorary.data.dataset_folder import check_inside
from lorary.data.jsonl import decode_json
from lorary.data.schema import shorten
from lorary.errors import TaskError
from lorary.reading import read_regular

MANIFEST = "manifest.json"
ROLES = ("train", "heldout")
# So alike (difflib's ratio), a role is a slip of one of these and no role of its own: `held-out`, `training`.
NEAR = 0.75


@dataclass(frozen=True)
class Entry:
    """What a manifest says about one task; None where it does not say.

    Args:
        file: the JSONL file with the rows, joined to the folder.
        family: group of related tasks.
        role: "train" or "heldout"; a task with another one is neither, unless it is named.
        metric: how the task is scored.
    """

    file: Path
    family: str | None
    role: str | None
    metric: str | None


def read_manifest(folder: Path) -> dict[str, Entry]:
    """Read `manifest.json`: `{"tasks": [{"task", "file", "family", "role", "metric", ...}]}`; other keys are notes.

    Returns:
        Entries by task name, in the order of the manifest.

    Raises:
        TaskError: if the manifest cannot be read, repeats a task, or names a file that does not
            exist or lies elsewhere.
    """
    path = folder / MANIFEST
    check_inside(path, folder)
    try:
        data = read_regular(path).removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise TaskError(f"{path}: the manifest must be readable", found=error.strerror or str(error)) from error
    document = decode_json(data, str(path))
    listed = document.get("tasks") if isinstance(document, dict) else None
    if not isinstance(listed, list) or not listed:
        raise TaskError(
            f"{path}: the manifest must be an object with a list 'tasks'",
            found=shorten(document),
            remedy='write {"tasks": [{"task": NAME, "file": FILE}]}',
        )
    entries: dict[str, Entry] = {}
    for position, item in enumerate(listed):
        name, entry = _parse_entry(item, folder, f"{path}: tasks[{position}]")
        if name in entries:
            raise TaskError(
                f"{path}: a task must be listed once", found=shorten(name), remedy="remove or rename one of the entries"
            )
        entries[name] = entry
    return entries


def _parse_entry(item: object, folder: Path, where: str) -> tuple[str, Entry]:
    if not isinstance(item, dict):
        raise TaskError(f"{where}: an entry must be an object", found=shorten(item), remedy='write {"task": NAME, ...}')
    name, file = _text(item, "task", where), folder / _text(item, "file", where)
    if not file.is_file():
        raise TaskError(
            f"{where}: the file of task '{name}' must exist",
            found=file,
            remedy="correct 'file' (relative to the manifest's folder), or add the file",
        )
    check_inside(file, folder)
    family, role, metric = (
        None if item.get(key) is None else _text(item, key, where) for key in ("family", "role", "metric")
    )
    if role not in (None, *ROLES) and (near := get_close_matches(role.lower(), ROLES, n=1, cutoff=NEAR)):
        raise TaskError(
            f"{where}: the role of task '{name}' must be spelt {' or '.join(ROLES)}, or be another word",
            found=shorten(role),
            remedy=f"did you mean {near[0]}? held-out tasks are kept apart by it",
        )
    return name, Entry(file=file, family=family, role=role, metric=metric)


def _text(item: dict[str, Any], key: str, where: str) -> str:
    value = item.get(key)
    if not isinstance(value, str) or not value:
        raise TaskError(f"{where}: '{key}' must be a non-empty text", found=shorten(value), remedy=f"correct '{key}'")
    return value
