"""library.json: the format's version, the base model and the default router."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorary.errors import LibraryError, UsageError
from lorary.library.base import BaseRecord
from lorary.library.files import encode_json
from lorary.library.handles import Folder
from lorary.library.layout import LIBRARY_FILE, WRITE_LOCK
from lorary.library.listing import FORMAT_VERSION, damaged_document, parse_current, read_current
from lorary.route.setting import Routing, parts_of

# What an interrupted `create` may leave in a folder that is otherwise empty.
OWN_TRACES = frozenset({WRITE_LOCK, f"{LIBRARY_FILE}.new"})
DEFAULT_ROUTER: Mapping[str, Any] = {"router": "arrow", "top_k": 4, "temperature": 1.0, "mix": "outputs"}


@dataclass(frozen=True)
class LibraryDocument:
    """The content of library.json.

    Args:
        base: the base model of all adapters.
        default_router: keys router, top_k, temperature, mix, and further ones where they were set.
    """

    base: BaseRecord
    default_router: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The document as it is written."""
        return {
            "base": self.base.to_json(),
            "default_router": dict(self.default_router),
            "format_version": FORMAT_VERSION,
        }


def read_document(library: Path) -> LibraryDocument:
    """Read library.json.

    Raises:
        LibraryError: if the path is no library, the file is damaged, or a newer Lorary wrote it.
    """
    return _document_in(library / LIBRARY_FILE, read_current(library))


def parse_document(path: Path, data: bytes) -> LibraryDocument:
    """The content of a library.json that has come from elsewhere.

    Args:
        path: of the file, for errors.
        data: its bytes.

    Raises:
        LibraryError: as for `read_document`.
    """
    return _document_in(path, parse_current(path, data))


def _document_in(path: Path, document: Mapping[str, Any]) -> LibraryDocument:
    try:
        base, router = BaseRecord.from_json(document["base"]), document["default_router"]
        # What a rule cannot do is refused where it is attached, so that `lorary library router` can still change it.
        _check_complete(router)
        parts_of(router)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise damaged_document(path, f"{type(error).__name__}: {error}"[:500]) from error
    return LibraryDocument(base, router)


def check_router(settings: Mapping[str, Any]) -> None:
    """Check default router settings; whether that router can run over the experts is found out when it is attached.

    Args:
        settings: router, top_k, temperature and mix, and any other fields of `lorary.route.setting.FIELDS`.

    Raises:
        UsageError: naming the field that is missing, unknown or out of range.
        RouterError: if there is no such router or mix, or the router cannot do what is asked.
    """
    _check_complete(settings)
    Routing.of(**settings)


def _check_complete(settings: Mapping[str, Any]) -> None:
    if missing := [key for key in DEFAULT_ROUTER if key not in settings]:
        raise UsageError(
            f"default router settings must have {', '.join(DEFAULT_ROUTER)}",
            found=f"{missing[0]} is missing",
            remedy=f"for example {dict(DEFAULT_ROUTER)}",
        )


def check_vacant(folder: Path) -> None:
    """Check that a new library may be made in a folder: it does not exist, or holds nothing of anybody's.

    Raises:
        LibraryError: naming what is there.
    """
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise LibraryError("a new library must get a folder of its own", found=f"{folder} is a file")
    if os.path.exists(folder / LIBRARY_FILE):
        raise LibraryError(
            "a new library must get a folder of its own",
            found=f"{folder} is a library already",
            remedy="open it, or choose another path",
        )
    if os.path.isdir(folder) and (entries := sorted({entry.name for entry in folder.iterdir()} - OWN_TRACES)):
        raise LibraryError(
            "a new library must get a folder of its own",
            found=f"{folder} holds {entries[0]}" + (f" and {len(entries) - 1} more" if len(entries) > 1 else ""),
            remedy="choose a path that does not exist yet",
        )


def write_document(root: Folder, document: LibraryDocument) -> None:
    """Replace library.json atomically, inside `change`: its one writer makes one fixed name beside it enough."""
    root.replace(LIBRARY_FILE, encode_json(document.to_json()), f"{LIBRARY_FILE}.new")
