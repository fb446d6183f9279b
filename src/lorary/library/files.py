"""Durable changes of files: written aside, forced to the disk, then renamed into place.

A rename is atomic, and it is durable once the folder that holds the name is forced to the disk too. So a process
that dies at any moment leaves either the old state or the new one under the final name.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lorary.errors import LibraryError
from lorary.library.handles import Folder, opened
from lorary.reading import parse_json, read_regular


def sha256(data: bytes) -> str:
    """The sha256 of some bytes, as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def encode_json(document: Mapping[str, Any]) -> bytes:
    """JSON with sorted keys, so that equal documents are equal bytes."""
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(path: Path, *, follow_links: bool = False) -> dict[str, Any]:
    """The JSON object in a file of a library.

    Args:
        path: the file.
        follow_links: whether it may be a symbolic link: only where it lies outside of a library.

    Raises:
        LibraryError: if the file is missing or damaged.
    """
    try:
        document = parse_json(read_regular(path, follow_links=follow_links))
        if not isinstance(document, dict):
            raise ValueError(f"it holds a {type(document).__name__}, not an object")
    except OSError as error:
        raise LibraryError(f"{path} must be readable", found=error.strerror, remedy="restore it from a copy") from error
    except ValueError as error:
        raise LibraryError(
            f"{path} must hold one JSON object", found=error, remedy="restore it from a copy: it is damaged"
        ) from error
    return document


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and force its bytes to the disk; its name is durable once its folder is forced too."""
    with opened(path.parent) as folder:
        folder.write(path.name, data)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make a folder with these files in it, all forced to the disk; on failure nothing stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with opened(folder.parent) as above:
        fill_folder(above, folder.name, files)


def fill_folder(above: Folder, name: str, files: Mapping[str, bytes]) -> None:
    """As `write_folder`, in a folder that is held open."""
    os.mkdir(name, dir_fd=above.descriptor)
    try:
        with above.enter(name) as folder:
            for file, data in files.items():
                folder.write(file, data)
            folder.sync()
    except BaseException:
        with suppress(OSError):
            above.remove_folder(name)
        raise


def replace_file(path: Path, data: bytes, aside: Path, *, follow_links: bool = True) -> None:
    """Replace a file atomically.

    Args:
        path: the final name.
        data: the new content.
        aside: a name in the same folder which nobody else uses.
        follow_links: whether that folder may be a symbolic link: False for one that lies in a library.
    """
    with opened(path.parent, follow_links=follow_links) as folder:
        folder.replace(path.name, data, aside.name)


@contextmanager
def reported(library: Path) -> Iterator[None]:
    """Turn errors of the operating system into a `LibraryError` that says what to do.

    Args:
        library: the library in which the work happens.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "free some space and repeat the command: nothing is half-written"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            remedy = "make the folder writable, or copy the library to one that is"
        elif error.errno in (errno.ENOENT, errno.ENOTDIR):
            remedy = "check the path, and repeat the command: a folder was moved or deleted"
        else:
            remedy = "repair the file system and repeat the command"
        raise LibraryError(
            f"library {library} must be writable", found=f"{error.filename or library}: {error.strerror}", remedy=remedy
        ) from error
