"""Lines of evaluations: two libraries together have all lines of both."""

import os
from collections.abc import Iterable
from pathlib import Path

from lorary.library.handles import Folder
from lorary.library.layout import RESULTS, RESULTS_FILE
from lorary.library.result_lines import result_lines
from lorary.reading import parse_json


def read_results(library: Path) -> bytes:
    """The lines that are whole, each once, in the order in which they were written; empty where there are none.

    Raises:
        LibraryError: if they cannot be read.
    """
    return joined(result_lines(library))


def joined(lines: Iterable[bytes]) -> bytes:
    """The lines of results that are whole, each once."""
    whole = dict.fromkeys(line.rstrip(b"\n") for line in lines if is_result(line))
    return b"".join(line + b"\n" for line in whole)


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
