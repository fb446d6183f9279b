"""The lines of evaluations in a library, one by one: the file may be of any size, and anybody's."""

import os
from collections.abc import Iterator
from pathlib import Path

from lorary.errors import LibraryError
from lorary.library.handles import check_kind, kind_of
from lorary.library.layout import RESULTS, RESULTS_FILE
from lorary.reading import open_regular

# Longer than any line that is written: a value is a score of a task, with its losses or answers by row.
MAX_LINE_BYTES = 16 * 1024 * 1024


def result_lines(library: Path) -> Iterator[bytes]:
    """The lines that were written, in their order. One that is longer than any that is written comes in useless pieces.

    Args:
        library: its folder `results/` holds the file; there may be none.

    Raises:
        LibraryError: if results are there and cannot be read, or are no text.
    """
    path = library / RESULTS / RESULTS_FILE
    for part in (path.parent, path):
        check_kind(part, "file" if part == path else "folder", kind_of(part))
    if not os.path.lexists(path):
        return
    try:
        with open_regular(path, follow_links=False) as file:
            while line := file.readline(MAX_LINE_BYTES):
                # A file of holes would go on for ever.
                if b"\0" in line:
                    raise LibraryError(
                        f"results must be lines of JSON at '{path}'",
                        found="zero bytes",
                        remedy="move the file out of the library, or restore it from a copy",
                    )
                yield line
    except OSError as error:
        raise LibraryError(f"results must be readable at '{path}'", found=error.strerror or error) from error
