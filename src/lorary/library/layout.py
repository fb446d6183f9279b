"""The names in a library's folder, and the check that each is what it has to be."""

import os
from collections.abc import Iterator
from pathlib import Path

from lorary.errors import LibraryError
from lorary.library.handles import Folder, Kind, check_kind, kind_of

LIBRARY_FILE = "library.json"
PROVENANCE_FILE = "provenance.json"
ADAPTERS, STAGING, DERIVED, RESULTS = "adapters", ".staging", "derived", "results"
# Where passes of a build keep their state, and what they write down about themselves.
BUILD_FOLDER, LOGS = ".build", "logs"
# What the library knows of remotes, and what has arrived from them and is not in force yet.
REMOTE = ".remote"
# In it: the URL that a copy was taken from which is only read.
READ_ONLY = "read_only"
# States of the library that can be gone back to.
SNAPSHOTS = ".snapshots"
# What a repair has put aside.
ASIDE = "aside"
SIGNATURE = "model.sig"
RESULTS_FILE = "evaluation.jsonl"
WRITE_LOCK, BUILD_LOCK, BUILD_PID = ".write.lock", ".build.lock", ".build.pid"
TRANSFER_LOCK, TRANSFER_PID = ".transfer.lock", ".transfer.pid"
FOLDERS = (ADAPTERS, STAGING, DERIVED, RESULTS, BUILD_FOLDER, LOGS, REMOTE, SNAPSHOTS, ASIDE)
FILES = (
    LIBRARY_FILE,
    f"{LIBRARY_FILE}.new",
    SIGNATURE,
    f"{SIGNATURE}.new",
    WRITE_LOCK,
    BUILD_LOCK,
    BUILD_PID,
    TRANSFER_LOCK,
    TRANSFER_PID,
)
PLACES: dict[str, Kind] = {**dict.fromkeys(FOLDERS, "folder"), **dict.fromkeys(FILES, "file")}


def check_places(library: Folder) -> None:
    """Check, before anything is written, that what stands in a library's folder is what has to stand there.

    Raises:
        LibraryError: naming the first folder or file that is a link or something else.
    """
    for name, kind in PLACES.items():
        library.check(name, kind)


def check_writable(library: Folder) -> None:
    """Check that a library is no copy which was made to be read: its own changes would be lost with the cache.

    Raises:
        LibraryError: naming the URL that it was taken from.
    """
    if library.kind(REMOTE) == "folder":
        with library.enter(REMOTE) as folder:
            if folder.check(READ_ONLY, "file"):
                url = folder.read(READ_ONLY).decode("utf-8", "replace")[:500]
                raise LibraryError(
                    f"library {library.path} must not be changed: it is a copy that was made to be read",
                    found=f"a copy of {url}",
                    remedy=f"lorary library clone {url} LIB, then change LIB and push it",
                )


def check_tree(folder: Path) -> None:
    """Check that a folder below a library and all that is in it are plain folders and files.

    Raises:
        LibraryError: naming the first link, FIFO, socket or device.
    """
    check_kind(folder, "folder", kind_of(folder))
    for path, kind in odd_entries(folder):
        check_kind(path, "file", kind)


def odd_entries(folder: Path) -> Iterator[tuple[Path, Kind]]:
    """Everything in a folder and below that is neither folder nor file; nothing where it is no folder itself."""
    if kind_of(folder) != "folder":
        return
    for above, folders, files in os.walk(folder, followlinks=False):
        for name in sorted([*folders, *files]):
            path = Path(above, name)
            kind = kind_of(path)
            if kind not in (None, "folder", "file"):
                yield path, kind
