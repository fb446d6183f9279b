"""What a place must be able to do to hold libraries as objects: our own interface, small enough for any of them."""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

from lorary.errors import LibraryError
from lorary.reading import MAX_DOCUMENT_BYTES

Result = TypeVar("Result")
ATTEMPTS = 6
# About how long to wait the first time.
FIRST_WAIT_S = 0.2


class StaleError(Exception):
    """What was to be replaced is no longer what was read: somebody else was first."""


class TransientError(Exception):
    """A request failed that may succeed if it is repeated."""


class AbsentError(Exception):
    """There is no object of that key."""


class Fetched(NamedTuple):
    """An object as it was read.

    Args:
        data: its bytes.
        etag: what tells it from what replaces it.
    """

    data: bytes
    etag: str


@runtime_checkable
class Store(Protocol):
    """A place that holds bytes by key. Keys are words with slashes between them.

    All methods raise `TransientError` for what may be repeated and `LibraryError` for what may not.
    """

    def get(self, key: str) -> Fetched:
        """An object of the index, or a ref; `AbsentError` where there is none.

        Raises:
            LibraryError: if it has more than `MAX_DOCUMENT_BYTES`.
        """
        ...

    def read(self, key: str, start: int, length: int) -> bytes:
        """So many bytes of an object from a position, fewer at its end; `AbsentError` where there is none."""
        ...

    def size(self, key: str) -> int | None:
        """Bytes of an object, None where there is none."""
        ...

    def list(self, prefix: str) -> dict[str, int]:
        """Keys that begin so, with their sizes in bytes."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Put an object where there is none; False, and nothing changed, where there is one."""
        ...

    def replace(self, key: str, data: bytes, etag: str) -> None:
        """Put an object in the place of the one that was read; `StaleError` if that is not there any more."""
        ...


@dataclass
class Traffic:
    """What was moved.

    Args:
        requests: answered ones.
        sent: bytes of content.
        received: bytes of content.
    """

    requests: int = 0
    sent: int = 0
    received: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, *, sent: int = 0, received: int = 0) -> None:
        """Count one request."""
        with self._lock:
            self.requests += 1
            self.sent += sent
            self.received += received


def check_size(size: int, key: str, where: str) -> None:
    """Refuse an object that is larger than any index.

    Raises:
        LibraryError: naming it.
    """
    if size > MAX_DOCUMENT_BYTES:
        raise LibraryError(
            f"{key} of {where} must have at most {MAX_DOCUMENT_BYTES:,} bytes, as refs and parts of an index do",
            found=f"{size:,} or more",
            remedy="push the library again to another place, or ask whoever keeps this one",
        )


def retried(action: Callable[[], Result], where: str) -> Result:
    """Do something that may fail for a moment, again after longer and longer waits.

    Args:
        action: raises `TransientError` where it may be repeated.
        where: the place, for the error.

    Raises:
        LibraryError: if it failed each time.
    """
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except TransientError as error:
            if attempt == ATTEMPTS - 1:
                raise LibraryError(
                    f"{where} must answer",
                    found=f"{error}, in each of {ATTEMPTS} attempts",
                    remedy="repeat the command: it goes on from here",
                ) from error
            # Two who failed together shall not meet again.
            time.sleep(FIRST_WAIT_S * 2**attempt * (0.5 + random.random()))
    raise AssertionError
