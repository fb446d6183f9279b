"""What every remote can do, whether it holds objects or a repository."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from lorary.errors import LibraryError
from lorary.remote.entries import Entries, FileRecord
from lorary.remote.place import Place
from lorary.remote.store import Traffic

# Bytes of a file by its record.
ReadFile = Callable[[FileRecord], bytes]


class Head(NamedTuple):
    """Where a ref stands.

    Args:
        snapshot: digest of what it names.
        etag: what tells that from what replaces it.
    """

    snapshot: str
    etag: str


class Push(NamedTuple):
    """What a push makes of a remote.

    Args:
        entries: all that the library is to have there.
        present: what it has there now.
        read: bytes of a file that is not there yet.
        advance: called after each file.
        is_public: whether everybody may read a repository that is made for it.
        card: a README for people, where the remote shows one.
        message: says what changed, where the remote keeps messages.
    """

    entries: Entries
    present: Entries
    read: ReadFile
    advance: Callable[[], None]
    is_public: bool
    card: Callable[[], bytes]
    message: str


@runtime_checkable
class Remote(Protocol):
    """A place with libraries in it. Methods raise `LibraryError` where it does not answer, or refuses."""

    place: Place
    traffic: Traffic

    def head(self, ref: str) -> Head | None:
        """Where a ref stands; None where there is none of that name."""
        ...

    def entries(self, snapshot: str, kept: Path | None) -> Entries:
        """What a snapshot holds.

        Args:
            snapshot: its digest.
            kept: a folder for parts of the index, which never change; None keeps nothing.
        """
        ...

    def read(self, snapshot: str, path: str, record: FileRecord, start: int, length: int) -> bytes:
        """A part of a file.

        Args:
            snapshot: digest of the snapshot.
            path: of the file in the library's folder.
            record: of the file.
            start: position of the first byte.
            length: bytes, at most.
        """
        ...

    def publish(self, push: Push, head: Head | None) -> str:
        """Move `main`; `StaleError` if it is not there any more.

        Returns:
            Digest of the snapshot.
        """
        ...

    def name(self, ref: str, snapshot: str) -> None:
        """Give a snapshot a name that never moves; `StaleError` if it names another one already."""
        ...


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What a push, a pull or a clone did.

    Args:
        library: its folder.
        url: of the remote.
        snapshot: digest of what lies there.
        removed: adapters that are no more where it went.
        requests: number of requests that the remote answered.
        bytes_sent: of content.
        bytes_received: of content.
    """

    library: str
    url: str
    snapshot: str
    removed: list[str]
    requests: int
    bytes_sent: int
    bytes_received: int


def moved_to(library: Path, remote: "Remote", snapshot: str, removed: list[str]) -> Moved:
    """What was moved between a library and a remote so far; see `Moved`."""
    traffic = remote.traffic
    return Moved(
        library=str(library), url=remote.place.url, snapshot=snapshot, removed=removed,
        requests=traffic.requests, bytes_sent=traffic.sent, bytes_received=traffic.received,
    )  # fmt: skip


def no_library(place: Place) -> LibraryError:
    """The error for a place without the ref that is asked for."""
    return LibraryError(
        f"{place.root} must hold a library under the ref '{place.ref}'",
        found="none of that name",
        remedy="check the URL, or push a library to it: lorary library push LIB URL",
    )
