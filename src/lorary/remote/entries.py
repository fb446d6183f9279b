"""What a library is made of, as a remote knows it: entries that come and go as one, each of named files.

    library               library.json
    adapters/NAME         PEFT's two files and provenance.json
    derived/KIND-HASH     what was computed from adapters, as the library keeps it
    results               lines of evaluations, where they are asked for

A file is known by its sha256 and size. Whatever was read from elsewhere is checked here before anything is made of it.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from lorary.errors import LibraryError
from lorary.formats.peft_reasons import CONFIG_FILE, WEIGHTS_FILE
from lorary.library.derived import is_entry_name
from lorary.library.folders import NAME
from lorary.library.layout import ADAPTERS, DERIVED, LIBRARY_FILE, PROVENANCE_FILE, RESULTS, RESULTS_FILE

LIBRARY = "library"
ADAPTER_FILES = frozenset({CONFIG_FILE, WEIGHTS_FILE, PROVENANCE_FILE})
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
MOST_BYTES = 1 << 50


class FileRecord(NamedTuple):
    """What tells the content of a file.

    Args:
        sha256: 64 hexadecimal digits.
        size: in bytes.
    """

    sha256: str
    size: int


Files = dict[str, FileRecord]
Entries = dict[str, Files]


def record(data: bytes) -> FileRecord:
    """The record of some bytes."""
    return FileRecord(hashlib.sha256(data).hexdigest(), len(data))


def path_of(entry: str, file: str) -> str:
    """Where a file of an entry lies in a library's folder."""
    return file if entry == LIBRARY else f"{entry}/{file}"


def digest_of(files: Files) -> str:
    """What tells the content of an entry."""
    return hashlib.sha256(encode(files)).hexdigest()


def encode(document: Any) -> bytes:
    """JSON without spaces and with sorted keys: equal documents are equal bytes."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def adapters_of(entries: Entries) -> dict[str, Files]:
    """The adapters among entries, by their own names."""
    start = f"{ADAPTERS}/"
    return {entry.removeprefix(start): files for entry, files in entries.items() if entry.startswith(start)}


def parse_entries(document: Any, where: str) -> Entries:
    """Entries as they were read from a remote.

    Raises:
        LibraryError: naming the first that can be none of a library.
    """
    if not isinstance(document, Mapping):
        raise damaged(where, f"a {type(document).__name__} in the place of entries")
    entries: Entries = {}
    for entry, files in document.items():
        if not isinstance(files, Mapping):
            raise damaged(where, f"{entry!a} without files")
        entries[entry] = {str(file): parse_record(value, where) for file, value in files.items()}
        if not _is_entry(entry, frozenset(entries[entry])):
            raise damaged(where, f"{entry!a} of files {sorted(entries[entry])[:5]}")
    return entries


def check_whole(entries: Entries, where: str) -> None:
    """Check that entries make up a library.

    Raises:
        LibraryError: if library.json is missing, or two adapters differ in upper and lower case alone.
    """
    if LIBRARY not in entries:
        raise damaged(where, f"no {LIBRARY_FILE}")
    spellings: dict[str, str] = {}
    for name in adapters_of(entries):
        if (other := spellings.setdefault(name.casefold(), name)) != name:
            raise damaged(where, f"adapters '{other}' and '{name}', which differ in upper and lower case alone")


def _is_entry(entry: str, files: frozenset[str]) -> bool:
    place, _, name = entry.partition("/")
    if place == ADAPTERS:
        return NAME.fullmatch(name) is not None and files == ADAPTER_FILES
    if place == DERIVED:
        return is_entry_name(name) and all(_PLAIN.fullmatch(file) for file in files)
    return (entry, files) in ((LIBRARY, frozenset({LIBRARY_FILE})), (RESULTS, frozenset({RESULTS_FILE})))


def parse_record(value: Any, where: str) -> FileRecord:
    """The record of a file as it was read from a remote; errors as for `parse_entries`."""
    if (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and _SHA256.fullmatch(value[0])
        and type(value[1]) is int
        and 0 <= value[1] <= MOST_BYTES
    ):
        return FileRecord(value[0], value[1])
    raise damaged(where, f"{ascii(value)[:100]} in the place of a sha256 and a size")


def damaged(where: str, finding: object) -> LibraryError:
    """The error for an index that is none."""
    return LibraryError(
        f"{where} must hold the index of a library, as it was pushed",
        found=finding,
        remedy="push the library again to another place, or ask whoever keeps this one",
    )
