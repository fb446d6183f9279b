"""Lines of evaluations: two libraries together have all lines of both."""

import os
from collections.abc import Iterable
from pathlib import Path

from lorary.errors import LibraryError
from lorary.library.handles import Folder, check_kind, kind_of
from lorary.library.layout import RESULTS, RESULTS_FILE
from lorary.reading import parse_json, read_regular


def read_results(library: Path) -> bytes:
    """The lines that are whole, each once, in the order in which they were written; empty where there are none.

    Raises:
        LibraryError: if they cannot be read.
    """
    path = library / RESULTS / RESULTS_FILE
    try:
        for part in (path.parent, path):
            check_kind(part, "file" if part == path else "folder", kind_of(part))
        if not os.path.lexists(path):
            return b""
        return joined(read_regular(path, max_bytes=None, follow_links=False))
    except OSError as error:
        raise LibraryError(f"results must be readable at '{path}'", found=error.strerror) from error


def joined(*texts: bytes) -> bytes:
    """The whole lines of several files of results, each once."""
    lines = dict.fromkeys(line for text in texts for line in text.split(b"\n") if is_result(line))
    return b"".join(line + b"\n" for line in lines)


def is_result(line: bytes) -> bool:
    """Whether a line is one of results: a key and a value."""
    try:
        entry = parse_json(line)
    except ValueError:
        return False
    return isinstance(entry, dict) and isinstance(entry.get("key"), str) and "value" in entry


def append_results(root: Folder, lines: Iterable[bytes]) -> None:
    """Append lines, inside `lorary.library.folders.change`."""
    with root.enter(RESULTS, make=True) as folder, os.fdopen(folder.append(RESULTS_FILE), "ab") as file:
        # A line of its own even after one that a kill cut short; empty lines are passed over.
        file.write(b"\n" + b"".join(line + b"\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())
