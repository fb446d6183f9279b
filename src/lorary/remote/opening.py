"""Which remote a place asks for."""

from pathlib import Path

from lorary.remote.objects import ObjectRemote
from lorary.remote.place import Place
from lorary.remote.remotes import Remote
from lorary.remote.store import Traffic

CLOUDS = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss")


def open_remote(place: Place, *, to_write: bool = False) -> Remote:
    """The remote that a place asks for; nothing is asked of it yet, or a connection at most.

    Args:
        place: the place.
        to_write: whether it is to be pushed to.

    Raises:
        LibraryError: if it is a folder that holds a library itself, is only read and to be written, or does not answer.
        MissingExtraError: if its packages are not installed.
    """
    # Each brings packages of its own, some of them of an extra.
    if place.scheme == "hf":
        from lorary.remote.hub import HubRemote

        return HubRemote(place)
    traffic = Traffic()
    if place.scheme == "file":
        from lorary.remote.folder import FolderStore

        return ObjectRemote(place, FolderStore(Path(place.root), traffic), traffic)
    if place.scheme in CLOUDS:
        from lorary.remote.cloud import CloudStore

        return ObjectRemote(place, CloudStore(place, traffic), traffic)
    from lorary.remote.filesystem import FilesystemStore, only_read

    if to_write:
        raise only_read(place.root)
    return ObjectRemote(place, FilesystemStore(place, traffic), traffic)
