"""What a study keeps about its stages: one file each, so that a stage whose inputs are the same is not done again."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorary.errors import LibraryError
from lorary.library.files import encode_json, read_json, replace_file, reported

RUNNING, DONE, FAILED = "running", "done", "failed"
FOLDER = "stages"


@dataclass(frozen=True)
class Record:
    """How a stage ended.

    Args:
        stage: its identity.
        key: hash of its settings and of what it reads.
        status: `running` (or killed while it ran), `done` or `failed`.
        outputs: hashes of what it made, by name.
        seconds: that its last run took.
        error: why it failed.
        note: a line on what it made.
    """

    stage: str
    key: str
    status: str
    outputs: Mapping[str, str]
    seconds: float = 0.0
    error: str = ""
    note: str = ""


def stage_key(**inputs: Any) -> str:
    """A hash of all that decides what a stage makes."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def read_record(out: Path, stage: str) -> Record | None:
    """The record of a stage; None where it was never begun, or the file is not one (it is then done again)."""
    try:
        return Record(**read_document(_path(out, stage)))
    except TypeError:
        return None


def write_record(out: Path, record: Record) -> None:
    """Replace the record of a stage.

    Raises:
        LibraryError: if the study's folder cannot be written.
    """
    write_document(_path(out, record.stage), asdict(record))


def read_document(path: Path) -> dict[str, Any]:
    """A JSON document of the study; empty where there is none or it is damaged, since a study can make each again."""
    try:
        return read_json(path, follow_links=True)
    except LibraryError:
        return {}


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document at once or not at all, with its folder.

    Raises:
        LibraryError: if it cannot be written.
    """
    with reported(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, encode_json(document), path.with_suffix(".tmp"))


def _path(out: Path, stage: str) -> Path:
    return out / FOLDER / f"{stage.replace(':', '-')}.json"
