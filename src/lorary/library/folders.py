"""The folders of a library on disk: where an adapter is, and how one is put, replaced and removed atomically.

    adapters/NAME              an adapter in force
    .staging/new/NAME          being written by the writer that holds the lock
    .staging/replaced/NAME     moved aside for its successor; in force as long as adapters/NAME is absent
    .staging/removed/NAME      being deleted

Readers look at the first and third place, in that order, and never change anything. A writer first repairs what a
killed writer left: an adapter that was moved aside goes back if its successor never came. It touches these places
only, and holds each folder open, so that no link leads it elsewhere.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lorary.errors import LibraryError, NoSuchAdapterError, UsageError, did_you_mean
from lorary.library.files import fill_folder, reported
from lorary.library.handles import Folder, opened
from lorary.library.layout import ADAPTERS, DERIVED, STAGING, check_places, check_writable
from lorary.library.lock import write_lock

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
NEW, REPLACED, REMOVED = "new", "replaced", "removed"


def check_name(name: str) -> None:
    """Refuse a name that could leave the adapters folder, hide in it, or pass for an option.

    Raises:
        UsageError: before anything is touched.
    """
    if not NAME.fullmatch(name):
        raise UsageError(
            "the name of an adapter must be 1 to 128 letters, digits, dots, dashes and underscores, "
            "and not begin with a dot or a dash",
            found=ascii(name[:200]),
            remedy="choose another name",
        )


@contextmanager
def change(library: Path, check: Callable[[], None] = lambda: None) -> Iterator[Folder]:
    """Make one change of a library: alone, on a repaired library, with errors that say what to do.

    Args:
        library: the library's folder.
        check: refuses a library that is not the one that was opened; called before anything is made, and once more
            under the lock.

    Yields:
        The library's folder, held open.
    """
    check()
    with reported(library), opened(library) as root:
        check_places(root)
        check_writable(root)
        with write_lock(library):
            check()
            _recover(root)
            try:
                yield root
            finally:
                _recover(root)


def _recover(root: Folder) -> None:
    """Put back what was moved aside without a successor, then clear the staging folder of what writers make in it."""
    if not root.check(STAGING, "folder"):
        return
    with root.enter(STAGING) as staging:
        if staging.check(REPLACED, "folder"):
            _put_back(root, staging)
        for place in (NEW, REPLACED, REMOVED, DERIVED):
            if staging.check(place, "folder"):
                _clear(staging, place)
    with suppress(OSError):  # something else lies in it
        os.rmdir(STAGING, dir_fd=root.descriptor)


def _put_back(root: Folder, staging: Folder) -> None:
    with staging.enter(REPLACED) as replaced, root.enter(ADAPTERS, make=True) as adapters:
        for name in replaced.names():
            if NAME.fullmatch(name) and replaced.check(name, "folder") and not adapters.check(name, "folder"):
                replaced.move(name, adapters)


def _clear(staging: Folder, place: str) -> None:
    with staging.enter(place) as folder:
        for name in folder.names():
            if NAME.fullmatch(name) and folder.check(name, "folder"):
                with suppress(OSError):  # what stays is cleared by the next writer
                    folder.remove_folder(name)
    with suppress(OSError):
        os.rmdir(place, dir_fd=staging.descriptor)


def put(root: Folder, name: str, files: Mapping[str, bytes], *, is_new: bool) -> None:
    """Put an adapter in place, inside `change`.

    Args:
        root: the library's folder, from `change`.
        name: a checked name.
        files: content by file name.
        is_new: True to add: the name must be free. False to replace: the adapter must be there.

    Raises:
        LibraryError: if the name is taken, also in other upper or lower case, or not there.
    """
    if is_new:
        check_free(root, name)
    else:
        check_there(root, name)
    with (
        root.enter(ADAPTERS, make=True) as adapters,
        root.enter(STAGING, make=True) as staging,
        staging.enter(NEW, make=True) as new,
    ):
        fill_folder(new, name, files)
        if not is_new:
            with staging.enter(REPLACED, make=True) as replaced:
                adapters.move(name, replaced)
        new.move(name, adapters)


def delete(root: Folder, name: str) -> None:
    """Remove an adapter, inside `change`.

    Raises:
        LibraryError: if it is not there.
    """
    check_there(root, name)
    with (
        root.enter(ADAPTERS) as adapters,
        root.enter(STAGING, make=True) as staging,
        staging.enter(REMOVED, make=True) as removed,
    ):
        adapters.move(name, removed)


def check_free(root: Folder, name: str, *, besides: str | None = None) -> None:
    """Check that a name is free, inside `change`.

    Args:
        root: the library's folder, from `change`.
        name: a checked name.
        besides: an adapter whose own name does not count.

    Raises:
        LibraryError: if it is taken, also in other upper or lower case.
    """
    for existing in _entries(root):
        # Some file systems do not tell upper case from lower, and a library must be able to move there.
        if existing.casefold() == name.casefold() and existing != besides:
            raise LibraryError(
                f"each adapter of library {root.path} must have a name of its own, upper and lower case counted as one",
                found=f"'{name}' is taken by '{existing}'",
                remedy="replace that adapter, remove it first, or give another name (--name)",
            )


def check_there(root: Folder, name: str) -> None:
    """Check that an adapter is there, inside `change`.

    Raises:
        LibraryError: if it is not.
    """
    entries = _entries(root)
    if name not in entries:
        raise no_adapter(root.path, name, entries)
    with root.enter(ADAPTERS) as adapters:
        adapters.check(name, "folder")


def _entries(root: Folder) -> list[str]:
    if root.kind(ADAPTERS) is None:
        return []
    with root.enter(ADAPTERS) as adapters:
        return adapters.names()


def no_adapter(library: Path, name: str, names: Sequence[str]) -> NoSuchAdapterError:
    """The error for an adapter that is asked for and not there.

    Args:
        library: the library's folder.
        name: of the adapter.
        names: of the adapters that are there.
    """
    return NoSuchAdapterError(
        f"library {library} must have the adapter that is asked for",
        found=f"no adapter '{name}'",
        remedy=did_you_mean(name, names, remedy=f"it has {len(names)}: list them with `lorary library ls {library}`"),
    )
