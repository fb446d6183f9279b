"""What a build keeps in `LIB/.build` while it runs: how experts were cut into shards, and the shards' checkpoints.

The library itself says which experts are finished. But the company of an expert decides how its numbers are rounded,
so that a build which was killed must go on with the very shards it began with.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorary.build.jobs import ExpertSpec
from lorary.build.settings import as_recorded
from lorary.data.schema import Task
from lorary.library.files import encode_json, read_json, replace_file, reported
from lorary.library.handles import Folder, opened
from lorary.library.layout import BUILD_FOLDER

# Folders of candidates begin with it, and those that are being removed with the other as well.
CANDIDATE, OLD = "k-", "old-"
# Folders of short adapters by which an adaptation compares tasks with a library.
SHORT = "short-"


def build_key(units: Sequence[ExpertSpec], tasks: Mapping[str, Task], window: int, dtype: str) -> str:
    """A hash of all that decides what a build trains together, so that another build never takes its state up.

    Args:
        units: all experts of the build.
        tasks: all tasks, by name.
        window: experts trained at a time.
        dtype: of the base.
    """
    return state_key({"units": _parts(units, tasks), "window": window, "dtype": dtype})


def candidate_folder(library: Path, k: int, units: Sequence[ExpertSpec], tasks: Mapping[str, Task], dtype: str) -> Path:
    """Where experts are built that may be chosen or not: keyed by all that decides what they become.

    Args:
        library: the library's folder.
        k: number of clusters that the experts are for.
        units: the experts.
        tasks: all tasks, by name.
        dtype: of the base.
    """
    return library / BUILD_FOLDER / f"{CANDIDATE}{k}-{state_key({'units': _parts(units, tasks), 'dtype': dtype})}"


def _parts(units: Sequence[ExpertSpec], tasks: Mapping[str, Task]) -> list[dict[str, Any]]:
    return [
        {"name": u.name, "settings": as_recorded(u.settings), "data": {n: tasks[n].data_hash for n in u.tasks}}
        for u in units
    ]


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
    shards: list[list[str]] = read_json(path)["shards"] if os.path.lexists(path) else []
    # Somebody may have removed experts meanwhile that were there when the shards were cut: those were cut in vain.
    if not set(pending) <= {name for shard in shards for name in shard}:
        shards = cut(pending, num_shards)
        with reported(library):
            path.parent.mkdir(exist_ok=True)
            replace_file(path, encode_json({"shards": shards}), path.with_suffix(".tmp"), follow_links=False)
    return [shard for shard in shards if set(shard) & set(pending)]


def checkpoint_path(library: Path, key: str, names: Sequence[str]) -> Path:
    """Where a shard keeps the state of its training: keyed by its build and by the experts in it."""
    return library / BUILD_FOLDER / f"{key}-{state_key(list(names))}.safetensors"


def close_build(library: Path, key: str) -> None:
    """Remove the state of a build that ended well, and of no other.

    Args:
        library: the library's folder.
        key: of the build.

    Raises:
        LibraryError: if it cannot be removed.
    """

    def remove_state(build: Folder) -> None:
        for name in build.names():
            if name.startswith(key):
                build.remove_file(name)

    _tidy(library, remove_state)


def remove_candidate(folder: Path) -> None:
    """Remove a library inside another one, so that one killed half-way leaves nothing that looks like a library.

    Args:
        folder: as `candidate_folder` gives it; it need not be there.

    Raises:
        LibraryError: if it cannot be removed.
    """
    _tidy(folder.parent.parent, lambda build: _remove(build, folder.name))


def sweep(library: Path) -> None:
    """Remove what builds that were given up have left: their states and their candidates.

    For a build that has put experts into the library, since what others had begun there may no longer fit beside them.

    Args:
        library: the library's folder.

    Raises:
        LibraryError: if it cannot be removed.
    """

    def remove_all(build: Folder) -> None:
        for name in build.names():
            if build.kind(name) == "file":
                build.remove_file(name)
            elif name.startswith((OLD, CANDIDATE, SHORT)):
                _remove(build, name.removeprefix(OLD))

    _tidy(library, remove_all)


def _tidy(library: Path, work: Callable[[Folder], None]) -> None:
    """Do some work where builds keep their state, if there is such a folder."""
    with reported(library), opened(library) as root:
        if root.check(BUILD_FOLDER, "folder"):
            with root.enter(BUILD_FOLDER) as build:
                work(build)


def _remove(build: Folder, name: str) -> None:
    """Rename a candidate first, so that one that is deleted half-way looks like no library."""
    aside = f"{OLD}{name}"
    build.remove_folder(aside)
    if build.check(name, "folder"):
        os.rename(name, aside, src_dir_fd=build.descriptor, dst_dir_fd=build.descriptor)
        build.remove_folder(aside)


def state_key(document: object) -> str:
    """A short hash of values of JSON: what belongs to one build, and to no other, is named by it."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]
