"""What is computed from a library's adapters, kept beside them: `derived/KIND-HASH/`, keyed by the hash of its inputs.

Whatever the result depends on is part of the key, so that a changed adapter asks for another key and nothing stale is
ever found. Entries are written aside and renamed, and each file is held to its recorded hash when it is read.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lorary.errors import LibraryError, UsageError
from lorary.library.files import encode_json, sha256
from lorary.library.folders import REMOVED, apply, change
from lorary.library.handles import Folder, check_kind, kind_of, opened
from lorary.library.layout import DERIVED, STAGING
from lorary.library.readers import READ_ATTEMPTS, find_folder, names_in
from lorary.reading import parse_json

ENTRY_FILE = "entry.json"
KIND = re.compile(r"[a-z][a-z0-9_]{0,63}")
HASH_DIGITS = 16

_ENTRY_NAME = re.compile(rf"{KIND.pattern}-[0-9a-f]{{{HASH_DIGITS}}}")

Read = TypeVar("Read")


@dataclass(frozen=True)
class DerivedEntry:
    """One derived document, as read.

    Args:
        kind: what it is (`clusters`, `poly`, ...).
        key: all that it depends on, as it was given when it was saved.
        files: content by file name.
    """

    kind: str
    key: Mapping[str, Any]
    files: Mapping[str, bytes]


def derived_folder(library: Path, kind: str, key: Mapping[str, Any]) -> Path:
    """Where a derived document of this key lies, whether or not it is there.

    Args:
        library: the library's folder.
        kind: lower-case letters, digits and underscores.
        key: all that it depends on (hashes of adapters, settings, seeds), as values of JSON.

    Raises:
        UsageError: if the kind cannot be the name of one.
    """
    if not KIND.fullmatch(kind):
        raise UsageError("a kind of derived data must be lower-case letters, digits and underscores", found=repr(kind))
    return library / DERIVED / derived_name(kind, key)


def derived_name(kind: str, key: Mapping[str, Any]) -> str:
    """The name of the folder of a derived document."""
    canonical = json.dumps(key, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return f"{kind}-{sha256(canonical.encode())[:HASH_DIGITS]}"


def is_entry_name(name: str) -> bool:
    """Whether a folder of that name may be one derived document."""
    return _ENTRY_NAME.fullmatch(name) is not None


def read_derived_files(library: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Name and content by file name of each derived document, as it lies on the disk, held to its hashes.

    Raises:
        LibraryError: at the first that is damaged.
    """
    for name in names_in(library, DERIVED):
        if is_entry_name(name) and (files := _stable(library / DERIVED / name, _all_files)) is not None:
            yield name, files


def damaged_derived(library: Path) -> Iterator[tuple[str, LibraryError]]:
    """Name of each derived document that is not what it records of itself, with what is wrong."""
    for name in filter(is_entry_name, names_in(library, DERIVED)):
        try:
            files = _stable(library / DERIVED / name, _all_files)
            if files is not None:
                check_derived(name, files)
        except LibraryError as error:
            yield name, error


def check_derived(name: str, files: Mapping[str, bytes]) -> None:
    """Check that files are the derived document of a name.

    Args:
        name: of its folder.
        files: content by file name.

    Raises:
        LibraryError: if its name does not follow from its key, or a file is not the one that it records.
    """
    where = Path(DERIVED) / name
    hashes, key, kind = _parse_index(where, files.get(ENTRY_FILE, b""))
    if not KIND.fullmatch(kind) or derived_name(kind, key) != name:
        raise _damaged(where, f"something of kind {kind[:64]!a} that was derived from something else")
    actual = {file: sha256(data) for file, data in files.items() if file != ENTRY_FILE}
    if hashes != actual or not all(map(_is_plain, actual)):
        raise _damaged(where, "other files than it records")


def save_derived(library: Path, kind: str, key: Mapping[str, Any], files: Mapping[str, bytes]) -> Path:
    """Put a derived document in place, atomically; an equal one that is there already stays untouched.

    Args:
        library: the library's folder.
        kind: as for `derived_folder`.
        key: as for `derived_folder`.
        files: content by file name.

    Returns:
        The folder.

    Raises:
        UsageError: if the kind or a file's name cannot be one.
        LibraryError: if the library cannot be written.
    """
    target = derived_folder(library, kind, key)
    for name in files:
        if not _is_plain(name):
            raise UsageError(f"a file of derived data must have a plain name other than {ENTRY_FILE}", found=repr(name))
    content = entry_of(kind, key, files)
    with change(library) as root:
        if not _holds(root, target.name, content):
            apply(root, [(DERIVED, target.name, content)])
    return target


def entry_of(kind: str, key: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, bytes]:
    """All files of a derived document as they lie on the disk: those given, and the record of them."""
    entry = {"files": {name: sha256(data) for name, data in files.items()}, "key": dict(key), "kind": kind}
    return {**files, ENTRY_FILE: encode_json(entry)}


def iterate_keys(library: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Kind and key of each derived document, without reading what was derived.

    Raises:
        LibraryError: at the first that is damaged.
    """
    for name in filter(is_entry_name, names_in(library, DERIVED)):
        if (index := _stable(library / DERIVED / name, _index)) is not None:
            yield index[2], index[1]


def discard_derived(library: Path, names: Collection[str]) -> None:
    """Remove derived documents, each atomically.

    Args:
        library: the library's folder.
        names: of the documents' folders; those that are not there are passed over.

    Raises:
        LibraryError: if the library cannot be written.
    """
    with (
        change(library) as root,
        root.enter(DERIVED, make=True) as derived,
        root.enter(STAGING, make=True) as above,
        above.enter(REMOVED, make=True) as removed,
    ):
        for name in names:
            if derived.check(name, "folder"):
                derived.move(name, removed)


def load_derived(library: Path, kind: str, key: Mapping[str, Any]) -> dict[str, bytes] | None:
    """Read a derived document; arguments as for `save_derived`.

    Returns:
        Content by file name, or None where there is none of this key.

    Raises:
        LibraryError: if it is damaged.
    """
    folder = derived_folder(library, kind, key)
    entry = _read(folder)
    if entry is None:
        return None
    if (entry.kind, entry.key) != (kind, json.loads(json.dumps(key))):  # copied from elsewhere, or renamed
        raise _damaged(folder, f"something of kind '{entry.kind}' that was derived from something else")
    return dict(entry.files)


def derived_hashes(library: Path, kind: str, key: Mapping[str, Any]) -> dict[str, str]:
    """The recorded hash of each file of a derived document, without reading them; empty where there is none.

    Arguments and error are those of `load_derived`.
    """
    return _stable(derived_folder(library, kind, key), lambda folder: _index(folder)[0]) or {}


def iterate_derived(library: Path, kind: str) -> Iterator[DerivedEntry]:
    """All derived documents of a kind, in the order of their hashes.

    Args:
        library: the library's folder.
        kind: as for `derived_folder`.

    Raises:
        LibraryError: at the first that is damaged.
    """
    pattern = re.compile(rf"{re.escape(kind)}-[0-9a-f]{{{HASH_DIGITS}}}")
    for name in filter(pattern.fullmatch, names_in(library, DERIVED)):
        entry = _read(library / DERIVED / name)
        if entry is not None:
            yield entry


def _holds(root: Folder, name: str, content: Mapping[str, bytes]) -> bool:
    if not root.check(DERIVED, "folder"):
        return False
    with root.enter(DERIVED) as derived:
        if not derived.check(name, "folder"):
            return False
        with derived.enter(name) as folder:
            try:
                return {file: folder.read_content(file) for file in folder.names()} == dict(content)
            except OSError:
                return False


def _read(folder: Path) -> DerivedEntry | None:
    return _stable(folder, _entry)


def _stable(folder: Path, read: Callable[[Folder], Read]) -> Read | None:
    """Read a document as of one moment, though a writer may replace it meanwhile; None where there is none.

    Args:
        folder: where it lies, or will lie once a change that is in force is carried out.
        read: reads what is wanted.
    """
    library, place, name = folder.parents[1], folder.parent.name, folder.name
    check_kind(folder.parent, "folder", kind_of(folder.parent))
    for _ in range(READ_ATTEMPTS):
        current = find_folder(library, place, name)
        if current is None:
            return None
        try:
            with opened(current, follow_links=False) as held:
                try:
                    return read(held)
                except (LibraryError, OSError) as error:
                    if find_folder(library, place, name) == current and os.path.samestat(
                        os.fstat(held.descriptor), os.stat(current)
                    ):
                        raise error if isinstance(error, LibraryError) else _damaged(folder, error) from error
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _damaged(folder, error.strerror or error) from error
    raise LibraryError(
        f"{folder} must hold still to be read",
        found=f"replaced during each of {READ_ATTEMPTS} attempts",
        remedy="stop the process that keeps writing to it",
    )


def _index(held: Folder) -> tuple[dict[str, str], dict[str, Any], str]:
    """Hashes of the files, the key and the kind."""
    try:
        data = held.read(ENTRY_FILE)
    except OSError as error:
        raise _damaged(held.path, f"{ENTRY_FILE}: {error.strerror or error}") from error
    return _parse_index(held.path, data)


def _parse_index(folder: Path, data: bytes) -> tuple[dict[str, str], dict[str, Any], str]:
    try:
        entry = parse_json(data)
    except ValueError as error:
        raise _damaged(folder, f"{ENTRY_FILE}: {error}") from error
    hashes, key, kind = (entry.get(part) if isinstance(entry, dict) else None for part in ("files", "key", "kind"))
    if not (isinstance(hashes, dict) and isinstance(key, dict) and isinstance(kind, str)):
        raise _damaged(folder, f"{ENTRY_FILE} does not say kind, key and files")
    try:
        derived_name(kind, key)
    except ValueError as error:  # NaN and infinity are no JSON, and Python reads them all the same
        raise _damaged(folder, f"{ENTRY_FILE}: {error}") from error
    return hashes, key, kind


def _all_files(held: Folder) -> dict[str, bytes]:
    return {**_entry(held).files, ENTRY_FILE: held.read(ENTRY_FILE)}


def _entry(held: Folder) -> DerivedEntry:
    hashes, key, kind = _index(held)
    files = {}
    for name, recorded in hashes.items():
        if not _is_plain(name):  # a foreign library must not lead out of its folder
            raise _damaged(held.path, f"a file named {name!a}")
        try:
            files[name] = held.read_content(name)
        except OSError as error:
            raise _damaged(held.path, f"{name}: {error.strerror}") from error
        if (digest := sha256(files[name])) != recorded:
            raise _damaged(held.path, f"{name} has sha256 {digest}, not {recorded}")
    return DerivedEntry(kind, key, files)


def _is_plain(name: str) -> bool:
    return Path(name).name == name and "\0" not in name and name not in ("", "..", ENTRY_FILE)


def _damaged(folder: Path, finding: object) -> LibraryError:
    return LibraryError(
        f"{folder} must hold what was derived, unchanged",
        found=finding,
        remedy="delete the folder and compute it again",
    )
