"""Durable changes of files: written aside, forced to the disk, then renamed into place.

A rename is atomic, and it is durable once the folder that holds the name is forced to the disk too. So a process
that dies at any moment leaves either the old state or the new one under the final name.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorary.errors import LibraryError


def sha256(data: bytes) -> str:
    """The sha256 of some bytes, as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def encode_json(document: Mapping[str, Any]) -> bytes:
    """JSON with sorted keys, so that equal documents are equal bytes."""
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a library.

    Raises:
        LibraryError: if the file is missing or damaged.
    """
    try:
        document = json.loads(path.read_bytes().decode("utf-8"))
        if not isinstance(document, dict):
            raise ValueError(f"it holds a {type(document).__name__}, not an object")
    except OSError as error:
        raise LibraryError(f"{path} must be readable", found=error.strerror, remedy="restore it from a copy") from error
    except (ValueError, RecursionError) as error:
        raise LibraryError(
            f"{path} must hold one JSON object", found=error, remedy="restore it from a copy: it is damaged"
        ) from error
    return document


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and force its bytes to the disk; its name is durable once its folder is forced too."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make a folder with these files in it, all forced to the disk; on failure nothing stays."""
    folder.mkdir(parents=True)
    try:
        for name, data in files.items():
            write_file(folder / name, data)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def replace_file(path: Path, data: bytes, aside: Path) -> None:
    """Replace a file atomically.

    Args:
        path: the final name.
        data: the new content.
        aside: a name on the same file system which nobody else uses.
    """
    try:
        write_file(aside, data)
        os.replace(aside, path)
        sync_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)


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
        else:
            remedy = "repair the file system and repeat the command"
        raise LibraryError(
            f"library {library} must be writable", found=f"{error.filename or library}: {error.strerror}", remedy=remedy
        ) from error
