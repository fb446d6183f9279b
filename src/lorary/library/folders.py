"""The folders of a library on disk: where an adapter is, and how one is put, replaced and removed atomically.

    adapters/NAME              an adapter in force
    .staging/new/NAME          being written by the writer that holds the lock
    .staging/replaced/NAME     moved aside for its successor; in force as long as adapters/NAME is absent
    .staging/removed/NAME      being deleted

Readers look at the first and third place, in that order, and never change anything. A writer first repairs what a
killed writer left: an adapter that was moved aside goes back if its successor never came.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from lorary.errors import LibraryError, LoraryError, UsageError
from lorary.library.files import reported, sync_folder, write_folder
from lorary.library.lock import write_lock

ADAPTERS = "adapters"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
# Each attempt meets another replacement in the very moment of reading, so a second one is rare already.
READ_ATTEMPTS = 100

Read = TypeVar("Read")


def check_name(name: str) -> None:
    """Refuse a name that could leave the adapters folder, hide in it, or pass for an option.

    Raises:
        UsageError: before anything is touched.
    """
    if not NAME.fullmatch(name):
        raise UsageError(
            "the name of an adapter must be 1 to 128 letters, digits, dots, dashes and underscores, "
            "and not begin with a dot or a dash",
            found=repr(name),
            remedy="choose another name",
        )


def names_in(library: Path) -> list[str]:
    """The names of all adapters, in canonical order.

    An adapter moves between two folders while it is replaced, so one look at each could miss it both times.
    """
    adapters, replaced = library / ADAPTERS, library / ".staging" / "replaced"
    looks = (_subfolders(adapters), _subfolders(replaced), _subfolders(adapters))
    return sorted({name for look in looks for name in look if NAME.fullmatch(name)})


def _subfolders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise LibraryError(
            f"{folder} must be readable", found=error.strerror, remedy="give yourself the right to read it"
        ) from error


def locate(library: Path, name: str) -> Path:
    """The folder that holds an adapter right now.

    Raises:
        UsageError: if the name can be no adapter's.
        LibraryError: if there is no such adapter.
    """
    check_name(name)
    places = (library / ADAPTERS / name, library / ".staging" / "replaced" / name, library / ADAPTERS / name)
    for place in places:
        if place.is_dir():
            return place
    raise LibraryError(
        f"library {library} must have the adapter that is asked for",
        found=f"no adapter '{name}'",
        remedy=f"it has {len(names_in(library))}: list them with `lorary library ls {library}`",
    )


def read_stable(library: Path, name: str, read: Callable[[Path], Read]) -> Read:
    """Read several files of one adapter as of one moment, though a writer may replace it meanwhile.

    Args:
        library: the library's folder.
        name: the adapter's name.
        read: reads what is wanted from the adapter's folder; called again if the folder changed under it.

    Raises:
        LoraryError: as `locate` and `read` raise it.
    """
    for _ in range(READ_ATTEMPTS):
        folder = locate(library, name)
        before = _identity(folder)
        try:
            result = read(folder)
        except (LoraryError, OSError):
            if before is not None and _identity(folder) == before:
                raise
            continue
        if before is not None and _identity(folder) == before:
            return result
    raise LibraryError(
        f"adapter '{name}' of library {library} must hold still to be read",
        found=f"replaced during each of {READ_ATTEMPTS} attempts",
        remedy="stop the process that keeps writing to it",
    )


def _identity(folder: Path) -> tuple[int, int, int] | None:
    try:
        stat = folder.stat()
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_ctime_ns


@contextmanager
def change(library: Path) -> Iterator[None]:
    """Make one change of a library: alone, on a repaired library, with errors that say what to do."""
    with reported(library), write_lock(library):
        _recover(library)
        try:
            yield
        finally:
            _recover(library)


def _recover(library: Path) -> None:
    """Put back what was moved aside without a successor, then clear the staging folder."""
    staging = library / ".staging"
    for name in _subfolders(staging / "replaced"):
        if not (library / ADAPTERS / name).exists():
            _move(staging / "replaced" / name, library / ADAPTERS / name)
    shutil.rmtree(staging, ignore_errors=True)


def put(library: Path, name: str, files: Mapping[str, bytes], *, is_new: bool) -> None:
    """Put an adapter in place, inside `change`.

    Args:
        library: the library's folder.
        name: a checked name.
        files: content by file name.
        is_new: True to add: the name must be free. False to replace: the adapter must be there.

    Raises:
        LibraryError: if the name is taken, also in other upper or lower case, or not there.
    """
    target, staging = library / ADAPTERS / name, library / ".staging"
    if is_new:
        _check_free(library, name)
    else:
        locate(library, name)
    if not target.parent.exists():
        target.parent.mkdir()
        sync_folder(library)
    write_folder(staging / "new" / name, files)
    if not is_new:
        _move(target, staging / "replaced" / name)
    _move(staging / "new" / name, target)


def delete(library: Path, name: str) -> None:
    """Remove an adapter, inside `change`.

    Raises:
        LibraryError: if it is not there.
    """
    _move(locate(library, name), library / ".staging" / "removed" / name)


def _check_free(library: Path, name: str) -> None:
    for taken in names_in(library):
        # Some file systems do not tell upper case from lower, and a library must be able to move there.
        if taken.casefold() == name.casefold():
            raise LibraryError(
                f"each adapter of library {library} must have a name of its own, upper and lower case counted as one",
                found=f"'{name}' is taken by '{taken}'",
                remedy="replace that adapter, remove it first, or give another name (--name)",
            )


def _move(source: Path, target: Path) -> None:
    """Rename a folder and force both names to the disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.rename(source, target)
    sync_folder(target.parent)
    sync_folder(source.parent)
