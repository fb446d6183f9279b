"""A library on disk as entries: what there is to push, and what a pull must not lose."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lorary.errors import LibraryError, LoraryError
from lorary.library.derived import read_derived_files
from lorary.library.files import reported
from lorary.library.handles import opened
from lorary.library.layout import ADAPTERS, DERIVED, LIBRARY_FILE, RESULTS, RESULTS_FILE
from lorary.library.listing import provenance_in
from lorary.library.readers import Identity, read_all, stamps_of
from lorary.library.store import Library
from lorary.reading import read_regular
from lorary.remote.entries import ADAPTER_FILES, LIBRARY, Entries, FileRecord, Files, path_of, record
from lorary.remote.results import read_results


@dataclass(frozen=True)
class Scan:
    """A library as of one moment.

    Args:
        library: its folder.
        entries: all that it is made of.
        stamps: what changes with each adapter that is replaced.
    """

    library: Path
    entries: Entries
    stamps: Mapping[str, Identity | None]

    def paths(self) -> dict[FileRecord, str]:
        """Where in the library's folder each content lies."""
        return {record: path_of(entry, file) for entry, files in self.entries.items() for file, record in files.items()}

    def read(self, path: str, expected: FileRecord) -> bytes:
        """The bytes of a file, which must be those that were scanned.

        Raises:
            LibraryError: if they are others by now.
        """
        try:
            data = read_regular(self.library / path, max_bytes=None, follow_links=False)
        except OSError as error:
            raise self._changed(path, error.strerror) from error
        if record(data) != expected:
            raise self._changed(path, "it was changed meanwhile")
        return data

    def _changed(self, path: str, finding: object) -> LibraryError:
        return LibraryError(
            f"{self.library / path} must stay as it is while it is read", found=finding, remedy="repeat the command"
        )


def scan(library: Library, *, results: bool) -> Scan:
    """The entries of a library: every byte is read and hashed.

    Args:
        library: to be pushed or pulled into.
        results: whether lines of evaluations count.

    Raises:
        LibraryError: at the first adapter or derived document that is not what it records of itself.
    """
    stamps = stamps_of(library.path)
    library.check_presence()
    with reported(library.path):
        document = read_regular(library.path / LIBRARY_FILE, follow_links=False)
    entries: Entries = {LIBRARY: {LIBRARY_FILE: record(document)}}
    for name, files in read_all(library.path, _adapter_files).items():
        if isinstance(files, LoraryError):
            raise files
        entries[f"{ADAPTERS}/{name}"] = files
    for name, contents in read_derived_files(library.path):
        entries[f"{DERIVED}/{name}"] = {file: record(data) for file, data in contents.items()}
    if results and (lines := read_results(library.path)):
        entries[RESULTS] = {RESULTS_FILE: record(lines)}
    return Scan(library.path, entries, stamps)


def _adapter_files(folder: Path, name: str) -> Files:
    recorded = provenance_in(folder, name)["files"]
    with opened(folder, follow_links=False) as held:
        if strays := sorted(set(held.names()) - ADAPTER_FILES):
            raise _damaged(name, f"a file {strays[0]!a}")
        files = {}
        for file in sorted(ADAPTER_FILES):
            try:
                files[file] = record(held.read_content(file))
            except OSError as error:
                raise _damaged(name, f"{file}: {error.strerror or os.strerror(error.errno or 0)}") from error
    for file, digest in recorded.items():
        if file not in files or files[file].sha256 != digest:
            raise _damaged(name, f"{file} of another sha256 than its provenance records")
    return files


def _damaged(name: str, finding: str) -> LibraryError:
    return LibraryError(
        f"adapter '{name}' must be whole to be pushed, and so must those beside it that are pulled over",
        found=finding,
        remedy="lorary library repair LIB --from URL, or remove the adapter",
    )
