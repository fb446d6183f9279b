"""Reading files that somebody else wrote: regular files only, of a bounded size, JSON of a bounded kind.

A FIFO would block for ever, a device would never end, and a document of a gigabyte would take the memory of the
machine. Everything here raises `OSError` or `ValueError`, which the caller turns into an error of its own room that
names the file.
"""

import errno
import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

# Larger than any configuration, index, manifest or tokenizer description that a model or a library has.
MAX_DOCUMENT_BYTES = 64 * 1024 * 1024
# Bytes that are read at a time of a file that is longer than it said.
MAX_PART_BYTES = 1024 * 1024


def open_regular(path: Path, *, follow_links: bool = True, folder: int | None = None) -> BufferedReader:
    """Open a regular file for reading; a FIFO, socket or device is refused without waiting for it.

    Args:
        path: the file.
        follow_links: whether the last part of the path may be a symbolic link.
        folder: descriptor of an open folder, in which the last part of the path is looked up; the path then only
            names the file in errors.

    Raises:
        OSError: if it cannot be opened, is no regular file, or is a link and links are not followed.
    """
    return os.fdopen(_opened(path, follow_links, folder)[0], "rb")


def _opened(path: Path, follow_links: bool, folder: int | None) -> tuple[int, int]:
    """A descriptor of a regular file, and its size in bytes; arguments and errors as for `open_regular`."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path if folder is None else path.name, flags, dir_fd=folder)
    except OSError as error:
        error.filename = str(path)
        if error.errno == errno.ELOOP and not follow_links:
            raise OSError(errno.ELOOP, "it is a symbolic link", str(path)) from error
        if error.errno == errno.ENXIO:  # what opening a socket says
            raise _not_regular(path) from error
        raise
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise _not_regular(path)
        return descriptor, status.st_size
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(
    path: Path,
    *,
    max_bytes: int | None = MAX_DOCUMENT_BYTES,
    follow_links: bool = True,
    folder: int | None = None,
) -> bytes:
    """The bytes of a regular file.

    Args:
        path: the file.
        max_bytes: refuse a larger file before reading it; None for weights, which may be of any size.
        follow_links: whether the last part of the path may be a symbolic link.
        folder: as for `open_regular`.

    Raises:
        OSError: as for `open_regular`, or if the file is larger than `max_bytes`.
    """
    if max_bytes is None:
        with open_regular(path, follow_links=follow_links, folder=folder) as file:
            return file.read()
    descriptor, size = _opened(path, follow_links, folder)
    try:
        # Without a buffer of its own, and with room for no more than there is: both take longer than a small file does.
        data = part = os.read(descriptor, min(size, max_bytes) + 1)
        while part and len(data) <= max_bytes:
            data += (part := os.read(descriptor, min(MAX_PART_BYTES, max_bytes + 1 - len(data))))
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(descriptor)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {max_bytes:,} bytes", str(path))
    return data


def parse_json(data: bytes) -> Any:
    """The value in a JSON document in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: if it is no JSON, is nested too deeply, gives a key twice, or holds half a character (a lone
            surrogate, which no file and no terminal can take).
    """
    try:
        value = _DECODER.decode(data.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if b"\\ud" in data or b"\\uD" in data:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"it holds half a character, \\u{ord(error.object[error.start]):04x}") from error
    return value


def read_json(path: Path, *, follow_links: bool = True) -> Any:
    """The value in a JSON file; errors as for `read_regular` and `parse_json`."""
    return parse_json(read_regular(path, follow_links=follow_links))


def _not_regular(path: Path) -> OSError:
    return OSError(errno.EINVAL, "it is not a regular file", str(path))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in document if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!r} stands in it twice")
    return document


# Made once: `json.loads` makes one for each document that has a hook, which takes as long as a small one.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
