"""What is computed from a library's adapters, kept beside them: `derived/KIND-HASH/`, keyed by the hash of its inputs.

Whatever the result depends on is part of the key, so that a changed adapter asks for another key and nothing stale is
ever found. Entries are written aside and renamed, and each file is held to its recorded hash when it is read.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorary.errors import LibraryError, UsageError
from lorary.library.files import encode_json, read_json, sha256, sync_folder, write_folder
from lorary.library.folders import change

DERIVED = "derived"
ENTRY_FILE = "entry.json"
KIND = re.compile(r"[a-z][a-z0-9_]{0,63}")
HASH_DIGITS = 16


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
    canonical = json.dumps(key, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return library / DERIVED / f"{kind}-{sha256(canonical.encode())[:HASH_DIGITS]}"


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
    entry = {"files": {name: sha256(data) for name, data in files.items()}, "key": dict(key), "kind": kind}
    content = {**files, ENTRY_FILE: encode_json(entry)}
    with change(library):
        if not _holds(target, content):
            _put(library, target, content)
    return target


def load_derived(library: Path, kind: str, key: Mapping[str, Any]) -> dict[str, bytes] | None:
    """Read a derived document.

    Args:
        library: the library's folder.
        kind: as for `derived_folder`.
        key: as for `derived_folder`.

    Returns:
        Content by file name, or None where there is none of this key.

    Raises:
        LibraryError: if it is damaged.
    """
    folder = derived_folder(library, kind, key)
    if not folder.is_dir():
        return None
    entry = _read(folder)
    if (entry.kind, entry.key) != (kind, json.loads(json.dumps(key))):  # copied from elsewhere, or renamed
        raise _damaged(folder, f"something of kind '{entry.kind}' that was derived from something else")
    return dict(entry.files)


def iterate_derived(library: Path, kind: str) -> Iterator[DerivedEntry]:
    """All derived documents of a kind, in the order of their hashes.

    Args:
        library: the library's folder.
        kind: as for `derived_folder`.

    Raises:
        LibraryError: at the first that is damaged.
    """
    pattern = re.compile(rf"{re.escape(kind)}-[0-9a-f]{{{HASH_DIGITS}}}")
    root = library / DERIVED
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if folder.is_dir() and pattern.fullmatch(folder.name):
            yield _read(folder)


def _holds(folder: Path, content: Mapping[str, bytes]) -> bool:
    try:
        return {file.name: file.read_bytes() for file in folder.iterdir()} == dict(content)
    except OSError:
        return False


def _put(library: Path, target: Path, content: Mapping[str, bytes]) -> None:
    """Write aside and rename, inside `change`, which clears the staging folder behind us."""
    staging = library / ".staging" / DERIVED
    write_folder(staging / target.name, content)
    if not target.parent.exists():
        target.parent.mkdir()
        sync_folder(library)
    if target.exists():
        # Between the two renames readers find nothing, which for derived data only means to compute it again.
        shutil.rmtree(staging / "old", ignore_errors=True)
        os.rename(target, staging / "old")
    os.rename(staging / target.name, target)
    sync_folder(target.parent)


def _read(folder: Path) -> DerivedEntry:
    entry = read_json(folder / ENTRY_FILE)
    hashes, key, kind = entry.get("files"), entry.get("key"), entry.get("kind")
    if not (isinstance(hashes, dict) and isinstance(key, dict) and isinstance(kind, str)):
        raise _damaged(folder, f"{ENTRY_FILE} does not say kind, key and files")
    files = {}
    for name, recorded in hashes.items():
        if not _is_plain(name):  # a foreign library must not lead out of its folder
            raise _damaged(folder, f"a file named {name!r}")
        try:
            files[name] = (folder / name).read_bytes()
        except OSError as error:
            raise _damaged(folder, f"{name}: {error.strerror}") from error
        if (found := sha256(files[name])) != recorded:
            raise _damaged(folder, f"{name} has sha256 {found}, not {recorded}")
    return DerivedEntry(kind, key, files)


def _is_plain(name: str) -> bool:
    return Path(name).name == name and name not in ("", "..", ENTRY_FILE)


def _damaged(folder: Path, found: str) -> LibraryError:
    return LibraryError(
        f"{folder} must hold what was derived, unchanged", found=found, remedy="delete the folder and compute it again"
    )
