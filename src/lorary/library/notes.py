"""Tags and a note on an adapter: what people write down about it. They stand in its provenance."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lorary.errors import LibraryError, UsageError
from lorary.formats.peft_reasons import CONFIG_FILE, WEIGHTS_FILE
from lorary.library.folders import change, check_name, check_there, put
from lorary.library.layout import ADAPTERS, PROVENANCE_FILE
from lorary.library.listing import check_provenance, tags_in
from lorary.library.provenance import encode_provenance
from lorary.reading import parse_json

TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}")
MOST_NOTE_CHARACTERS = 2000


def change_tags(
    library: Path, check: Callable[[], None], name: str, add: Iterable[str], remove: Iterable[str]
) -> list[str]:
    """Give an adapter tags and take others from it, in one change.

    Args:
        library: the library's folder.
        check: as for `lorary.library.folders.change`.
        name: of the adapter.
        add: tags that it is to have.
        remove: tags that it is not to have; it may lack them already.

    Returns:
        Its tags now, sorted.

    Raises:
        UsageError: if a tag cannot be one, or is to be there and not.
        LibraryError: if there is no such adapter, or the library cannot be written.
    """
    added, removed = set(add), set(remove)
    if wrong := sorted(tag for tag in added | removed if not TAG.fullmatch(tag)):
        raise UsageError(
            "a tag must be 1 to 64 letters, digits, dots, colons, slashes, dashes and underscores, and begin with a "
            "letter or a digit",
            found=ascii(wrong[0][:200]),
            remedy="for example +reviewed or +team/search",
        )
    if both := sorted(added & removed):
        raise UsageError("a tag must be added or removed, not both", found=both[0])

    def edit(provenance: dict[str, Any]) -> None:
        provenance["tags"] = sorted((set(tags_in(provenance)) | added) - removed)
        if not provenance["tags"]:
            del provenance["tags"]

    return tags_in(_edit(library, check, name, edit))


def change_note(library: Path, check: Callable[[], None], name: str, text: str) -> None:
    """Write the note on an adapter, in the place of an earlier one; an empty text takes it away.

    Args:
        library: the library's folder.
        check: as for `lorary.library.folders.change`.
        name: of the adapter.
        text: up to 2,000 characters.

    Raises:
        UsageError: if it is longer.
        LibraryError: if there is no such adapter, or the library cannot be written.
    """
    if len(text) > MOST_NOTE_CHARACTERS:
        raise UsageError(f"a note must have at most {MOST_NOTE_CHARACTERS:,} characters", found=f"{len(text):,}")

    def edit(provenance: dict[str, Any]) -> None:
        provenance["note"] = text
        if not text.strip():
            del provenance["note"]

    _edit(library, check, name, edit)


def _edit(
    library: Path, check: Callable[[], None], name: str, edit: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Change the provenance of an adapter; its other files stay, byte for byte. Nothing is written without a change."""
    check_name(name)
    with change(library, check) as root:
        check_there(root, name)
        with root.enter(ADAPTERS) as adapters, adapters.enter(name) as folder:
            before = folder.read(PROVENANCE_FILE)
            files = {file: folder.read(file, max_bytes=None) for file in (CONFIG_FILE, WEIGHTS_FILE)}
        try:
            provenance = parse_json(before)
        except ValueError as error:
            raise LibraryError(
                f"{PROVENANCE_FILE} of adapter '{name}' must hold one JSON object",
                found=error,
                remedy="restore it from a copy: it is damaged",
            ) from error
        check_provenance(name, provenance if isinstance(provenance, dict) else {})
        edit(provenance)
        data = encode_provenance(name, provenance)
        if data != before:
            put(root, name, {**files, PROVENANCE_FILE: data}, is_new=False)
    return provenance
