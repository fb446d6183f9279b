"""The folders of a library on disk, and how a change of any number of them comes into force at one moment.

    adapters/NAME, derived/NAME     in force, unless .staging/committed says otherwise
    .staging/new                    a change that is being written by the writer that holds the lock
    .staging/committed              a change in force: adapters/NAME and derived/NAME, gone/NAME for adapters that are
                                    removed, and library.json where it changes
    .staging/done, .staging/removed being deleted

A change is written whole, and one rename of its folder to `committed` brings it into force. Readers look there first,
and never change anything. Then the parts move to their places; if the writer is killed meanwhile, the next one goes on.
It touches these places only, and holds each folder open, so that no link leads it elsewhere.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lorary.errors import LibraryError, NoSuchAdapterError, UsageError, did_you_mean
from lorary.library.files import fill_folder, reported
from lorary.library.handles import Folder, opened
from lorary.library.layout import ADAPTERS, DERIVED, LIBRARY_FILE, STAGING, check_places, check_writable
from lorary.library.lock import write_lock

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
NEW, COMMITTED, DONE, REMOVED, GONE = "new", "committed", "done", "removed", "gone"
# Place, name and content by file name of a folder that comes or is replaced.
NewFolder = tuple[str, str, Mapping[str, bytes]]


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
    """Carry out the change that is in force, then clear the staging folder of what writers make in it."""
    if not root.check(STAGING, "folder"):
        return
    with root.enter(STAGING) as staging:
        if staging.check(COMMITTED, "folder"):
            _carry_out(root, staging)
        for place in (NEW, DONE, REMOVED):
            if staging.check(place, "folder"):
                with suppress(OSError):  # what stays is cleared by the next writer
                    staging.remove_folder(place)
    with suppress(OSError):  # something else lies in it
        os.rmdir(STAGING, dir_fd=root.descriptor)


def _carry_out(root: Folder, staging: Folder) -> None:
    """Move all of a change to its places; it stays in force until the end, so that it may be begun again."""
    with staging.enter(COMMITTED) as committed, staging.enter(REMOVED, make=True) as removed:
        for place in (ADAPTERS, DERIVED):
            if committed.check(place, "folder"):
                with committed.enter(place) as source, root.enter(place, make=True) as target:
                    for name in filter(NAME.fullmatch, source.names()):
                        source.check(name, "folder")
                        _put_away(target, name, removed)
                        source.move(name, target)
        if committed.check(GONE, "folder"):
            with committed.enter(GONE) as gone, root.enter(ADAPTERS, make=True) as adapters:
                for name in filter(NAME.fullmatch, gone.names()):
                    _put_away(adapters, name, removed)
        if committed.check(LIBRARY_FILE, "file"):
            committed.move(LIBRARY_FILE, root)
        if staging.check(DONE, "folder"):
            staging.remove_folder(DONE)
    os.rename(COMMITTED, DONE, src_dir_fd=staging.descriptor, dst_dir_fd=staging.descriptor)
    staging.sync()


def _put_away(folder: Folder, name: str, removed: Folder) -> None:
    if folder.check(name, "folder"):
        removed.remove_folder(name)
        folder.move(name, removed)


def apply(root: Folder, new: Iterable[NewFolder] = (), gone: Sequence[str] = (), document: bytes | None = None) -> None:
    """Change any number of adapters and derived documents at one moment, inside `change`.

    Args:
        root: the library's folder, from `change`.
        new: folders that come, or take the place of those of their names; read one by one.
        gone: names of adapters that are removed.
        document: a new library.json.
    """
    with (
        root.enter(STAGING, make=True) as staging,
        staging.enter(NEW, make=True) as change_folder,
    ):
        for place, name, files in new:
            with change_folder.enter(place, make=True) as above:
                fill_folder(above, name, files)
                above.sync()
        for name in gone:
            with change_folder.enter(GONE, make=True) as above:
                os.mkdir(name, dir_fd=above.descriptor)
                above.sync()
        if document is not None:
            change_folder.write(LIBRARY_FILE, document)
        change_folder.sync()
        os.rename(NEW, COMMITTED, src_dir_fd=staging.descriptor, dst_dir_fd=staging.descriptor)
        staging.sync()
        _carry_out(root, staging)


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
    apply(root, [(ADAPTERS, name, files)])


def delete(root: Folder, name: str) -> None:
    """Remove an adapter, inside `change`.

    Raises:
        LibraryError: if it is not there.
    """
    check_there(root, name)
    apply(root, gone=[name])


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
