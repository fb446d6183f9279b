"""What a build keeps in `LIB/.build` while it runs: how experts were cut into shards, and the shards' checkpoints.

The library itself says which experts are finished. But the company of an expert decides how its numbers are rounded,
so that a build which was killed must go on with the very shards it began with.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lorary.data.schema import Task
from lorary.library.files import encode_json, read_json, replace_file, reported
from lorary.recipes.build_settings import as_recorded
from lorary.recipes.jobs import Unit
from lorary.recipes.open import BUILD_FOLDER


def build_key(units: Sequence[Unit], tasks: Mapping[str, Task], window: int, dtype: str) -> str:
    """A hash of all that decides what a build trains together, so that another build never takes its state up.

    Args:
        units: all experts of the build.
        tasks: all tasks, by name.
        window: experts trained at a time.
        dtype: of the base.
    """
    parts = [
        {"name": u.name, "settings": as_recorded(u.settings), "data": {n: tasks[n].data_hash for n in u.tasks}}
        for u in units
    ]
    return _digest({"units": parts, "window": window, "dtype": dtype})


def cut(names: Sequence[str], num_shards: int) -> list[list[str]]:
    """Deal experts out to shards, in turn: a function of the names and nothing else.

    Args:
        names: in the order in which they shall be trained.
        num_shards: at least 1; empty shards are left out.
    """
    return [list(names[start::num_shards]) for start in range(min(num_shards, len(names)))]


def open_shards(library: Path, key: str, pending: Sequence[str], num_shards: int) -> list[list[str]]:
    """The shards of a build, as it began: read where it was interrupted, else made of what is pending, and kept.

    Args:
        library: the library's folder.
        key: of the build.
        pending: experts that the library lacks.
        num_shards: into how many to cut.

    Returns:
        Names by shard; shards of which nothing is pending are left out.

    Raises:
        LibraryError: if the file is damaged or cannot be written.
    """
    path = library / BUILD_FOLDER / f"{key}.json"
    shards: list[list[str]] = read_json(path)["shards"] if path.exists() else []
    # Somebody may have removed experts meanwhile that were there when the shards were cut: those were cut in vain.
    if not set(pending) <= {name for shard in shards for name in shard}:
        shards = cut(pending, num_shards)
        with reported(library):
            path.parent.mkdir(exist_ok=True)
            replace_file(path, encode_json({"shards": shards}), path.with_suffix(".tmp"))
    return [shard for shard in shards if set(shard) & set(pending)]


def checkpoint_path(library: Path, key: str, names: Sequence[str]) -> Path:
    """Where a shard keeps the state of its training: keyed by its build and by the experts in it."""
    return library / BUILD_FOLDER / f"{key}-{_digest(list(names))}.safetensors"


def close_build(library: Path) -> None:
    """Remove the state of builds once one ended well: its own, and what builds with other settings left behind."""
    folder = library / BUILD_FOLDER
    with reported(library):
        for path in folder.glob("*") if folder.is_dir() else []:
            if path.is_file():
                path.unlink(missing_ok=True)


def _digest(document: object) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]
