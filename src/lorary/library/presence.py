"""Whether a library that is open still lies where it was opened.

It may be moved, deleted, or give way to another one of the same path while a process has it open. What is written
then would be lost, or end in somebody else's library.
"""

import os
from pathlib import Path

from lorary.errors import LibraryError
from lorary.library.base import BaseRecord
from lorary.library.document import read_document
from lorary.library.layout import LIBRARY_FILE

Stamp = tuple[int, int, int, int] | None


class Presence:
    """Knows the library's folder and its library.json from the moment it was opened.

    Args:
        library: the library's folder.
        base: the base model of all its adapters.
    """

    def __init__(self, library: Path, base: BaseRecord) -> None:
        self._library = library
        self._base = base
        self._folder = _number(library)
        self._file = _stamp(library / LIBRARY_FILE)

    def check(self) -> None:
        """Check that the same library is still there.

        Raises:
            LibraryError: if its folder was moved, deleted or replaced, or its library.json is gone, damaged or of
                another base.
        """
        folder, file = _number(self._library), _stamp(self._library / LIBRARY_FILE)
        if (folder, file) == (self._folder, self._file) and None not in (folder, file):
            return
        if folder is None:
            raise self._gone("nothing is there any more: it was moved or deleted")
        if folder != self._folder:
            raise self._gone("another folder is there")
        # Somebody may have set another router, which is a new file. Of a base, a library has one for its whole life.
        if read_document(self._library).base.fingerprint != self._base.fingerprint:
            raise self._gone("a library of another base model is there")
        self._file = file

    def _gone(self, finding: str) -> LibraryError:
        return LibraryError(
            f"library {self._library} must stay where it was opened",
            found=finding,
            remedy="open the library where it is now",
        )


def _number(folder: Path) -> tuple[int, int] | None:
    try:
        stat = os.stat(folder)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _stamp(file: Path) -> Stamp:
    try:
        stat = os.stat(file, follow_symlinks=False)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
