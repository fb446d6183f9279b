"""Whole files of a remote, and the check that two libraries belong to one base model."""

from pathlib import Path

from lorary.errors import BaseModelError
from lorary.library.base import BaseRecord
from lorary.library.document import LibraryDocument, parse_document
from lorary.library.layout import LIBRARY_FILE
from lorary.remote.arrivals import CHUNK_BYTES
from lorary.remote.entries import LIBRARY, Entries, FileRecord, damaged, record
from lorary.remote.remotes import Remote


def read_whole(remote: Remote, snapshot: str, path: str, expected: FileRecord) -> bytes:
    """The bytes of a file, held to its sha256.

    Raises:
        LibraryError: if it is another one.
    """
    parts, start = [], 0
    while start < expected.size:
        part = remote.read(snapshot, path, expected, start, min(CHUNK_BYTES, expected.size - start))
        if not part:
            break
        parts.append(part)
        start += len(part)
    data = b"".join(parts)
    if record(data) != expected:
        raise damaged(f"{remote.place.root}@{snapshot[:12]}", f"{path} of sha256 {record(data).sha256}")
    return data


def document_of(remote: Remote, snapshot: str, entries: Entries) -> LibraryDocument:
    """The library.json of a snapshot, checked."""
    data = read_whole(remote, snapshot, LIBRARY_FILE, entries[LIBRARY][LIBRARY_FILE])
    return parse_document(Path(f"{LIBRARY_FILE} of {remote.place.root}"), data)


def check_base(base: BaseRecord, remote: Remote, snapshot: str, theirs: Entries, mine: Entries) -> None:
    """Check that a library here and one there have the same base model.

    Args:
        base: of the one here.
        remote: where the other is.
        snapshot: its digest.
        theirs: its entries.
        mine: entries of the one here: where both have the same library.json, nothing is read.

    Raises:
        BaseModelError: if they have not.
    """
    if theirs[LIBRARY] == mine[LIBRARY]:
        return
    other = document_of(remote, snapshot, theirs).base
    if other.fingerprint != base.fingerprint:
        raise BaseModelError(
            f"a library and its remote {remote.place.root} must have one base model",
            found=f"{base.name!a} here, {other.name!a} there",
            remedy="choose another place for this library",
        )
