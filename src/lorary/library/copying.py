"""A copy of some adapters of a library, as a library of its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lorary.adapter import Adapter
from lorary.library.files import encode_json, read_json, reported, write_file
from lorary.library.folders import change, put
from lorary.library.handles import opened
from lorary.library.layout import LIBRARY_FILE
from lorary.library.readers import read_stable
from lorary.library.store import Library


def copy_library(source: Library, target: Path, names: Sequence[str], added: Mapping[str, Adapter]) -> Library:
    """Copy adapters byte for byte, and commit others beside them.

    Args:
        source: the library; its base and default router are the copy's too.
        target: a folder that does not exist.
        names: the adapters to copy.
        added: adapters that the source does not have, or has in another form, by name.

    Returns:
        The copy.

    Raises:
        LibraryError: if an adapter is not there any more, or the copy cannot be written.
    """
    with reported(target):
        target.mkdir(parents=True)
        write_file(target / LIBRARY_FILE, encode_json(read_json(source.path / LIBRARY_FILE)))
    for name in names:
        files = read_stable(source.path, name, _files_in)
        with change(target) as root:
            put(root, name, files, is_new=True)
    copy = Library.open(target)
    for adapter in added.values():
        copy.add_adapter(adapter, {"tasks": []})
    return copy


def _files_in(folder: Path) -> dict[str, bytes]:
    with opened(folder, follow_links=False) as held:
        return {name: held.read_content(name) for name in held.names() if held.kind(name) == "file"}
