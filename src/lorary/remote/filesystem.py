"""A remote at anything that fsspec reads: a web server, an archive, a network share. It is only read."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import fsspec

from lorary.errors import LibraryError, UsageError
from lorary.reading import MAX_DOCUMENT_BYTES
from lorary.remote.hiding import hide
from lorary.remote.place import Place
from lorary.remote.store import AbsentError, Fetched, Traffic, TransientError, check_size


class FilesystemStore:
    """Objects as files of a file system of fsspec.

    Args:
        place: the URL, whose scheme says which.
        traffic: where requests are counted.

    Raises:
        UsageError: if it knows no such scheme, or lacks the package for it.
        LibraryError: if it connects at once and gets no answer.
    """

    def __init__(self, place: Place, traffic: Traffic) -> None:
        self._traffic, self._where = traffic, place.root
        try:
            filesystem, root = fsspec.core.url_to_fs(place.root)
        except (ValueError, ImportError) as error:
            raise UsageError(
                "the URL of a remote library must have a scheme that can be read",
                found=f"{place.scheme}://: {hide(str(error))}",
                remedy="s3://, gs://, az://, hf://, a folder, or install the package that fsspec needs for it",
            ) from None
        except Exception as error:  # some connect at once, and each has errors of its own
            raise LibraryError(
                f"{self._where} must answer",
                found=hide(f"{type(error).__name__}: {error}"),
                remedy="check the URL and the network, then repeat the command",
            ) from None
        self._filesystem: Any = filesystem
        self._root = str(root).rstrip("/")

    def get(self, key: str) -> Fetched:
        """A whole file."""
        with self._reported():
            data = bytes(self._filesystem.cat_file(f"{self._root}/{key}", start=0, end=MAX_DOCUMENT_BYTES + 1))
        check_size(len(data), key, self._where)
        self._traffic.add(received=len(data))
        return Fetched(data, "")

    def read(self, key: str, start: int, length: int) -> bytes:
        """A part of a file; a server that gives no parts gives all of it."""
        with self._reported():
            data = bytes(self._filesystem.cat_file(f"{self._root}/{key}", start=start, end=start + length))
        self._traffic.add(received=len(data))
        return data[start : start + length] if len(data) > length else data

    def size(self, key: str) -> int | None:
        """Refused: only who writes asks."""
        self._refuse()

    def list(self, prefix: str) -> dict[str, int]:
        """Refused: only who writes asks."""
        self._refuse()

    def create(self, key: str, data: bytes) -> bool:
        """Refused: nothing here can be put on condition."""
        self._refuse()

    def replace(self, key: str, data: bytes, etag: str) -> None:
        """Refused: nothing here can be put on condition."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise only_read(self._where)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise AbsentError(self._where) from None
        except PermissionError as error:
            raise LibraryError(
                f"{self._where} must be readable", found=hide(str(error)), remedy="give credentials by the environment"
            ) from None
        except Exception as error:  # each file system has errors of its own
            raise TransientError(hide(f"{type(error).__name__}: {error}")) from None


def only_read(where: str) -> LibraryError:
    """The error for a push to a place where nothing can be put on condition."""
    return LibraryError(
        f"{where} must be at a store that can put an object on condition, to be pushed to",
        found="a place that is only read",
        remedy="push to s3://, gs://, az://, hf:// or a folder",
    )
