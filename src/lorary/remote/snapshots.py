"""Snapshots of a library: its own objects and refs in `.snapshots`, as a remote holds them.

Files of adapters are not copied: they are linked, and a change of a library never writes into a file. So a snapshot
costs an index, and what it needs outlives the adapters. Objects that no snapshot names are removed on request alone.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from lorary.errors import LibraryError, UsageError, did_you_mean
from lorary.library.files import reported
from lorary.library.folders import change
from lorary.library.handles import Folder
from lorary.library.layout import ADAPTERS, SNAPSHOTS, check_tree
from lorary.library.snapshot import Rollback, Snapshot
from lorary.library.store import Library
from lorary.remote.entries import Entries, Files, adapters_of, path_of
from lorary.remote.folder import FolderStore
from lorary.remote.objects import ObjectRemote
from lorary.remote.place import MAIN, REF, Place
from lorary.remote.pull import check_entry, check_still, install
from lorary.remote.remotes import Push
from lorary.remote.scan import Scan, scan
from lorary.remote.store import StaleError, Traffic
from lorary.remote.whole import read_whole

OBJECTS, REFS = "objects", "refs"


def take_snapshot(library: Library, name: str | None = None) -> Snapshot:
    """Keep the state of a library under a name.

    Args:
        library: is not changed, and must be whole.
        name: that it can be gone back to by; the next free number where None.

    Raises:
        UsageError: if the name cannot be one.
        LibraryError: if the name is taken, the library is damaged, or it cannot be written.
    """
    if name is not None:
        _check_name(name)
    with reported(library.path):
        return _take(library, _scan(library), name)


def _scan(library: Library) -> Scan:
    """The library as of one moment, once what a killed writer left is carried out."""
    with change(library.path, library.check_presence):
        pass
    return scan(library, results=False)


def _take(library: Library, here: Scan, name: str | None) -> Snapshot:
    with change(library.path, library.check_presence) as root:
        remote = snapshot_remote(library.path)
        check_still(here, list(adapters_of(here.entries)))
        taken = {snapshot.name: snapshot for snapshot in list_snapshots(library.path)}
        name = name or next(str(number) for number in range(1, len(taken) + 2) if str(number) not in taken)
        with root.enter(SNAPSHOTS, make=True) as place, place.enter(OBJECTS, make=True) as objects:
            for path, sha256 in _files_of_adapters(here.entries):
                _link(library.path / path, objects, sha256)
            objects.sync()
        paths = here.paths()
        push = Push(
            here.entries, {}, lambda record: here.read(paths[record], record), lambda: None, False, lambda: b"", ""
        )
        digest = remote.publish(push, remote.head(MAIN))
        try:
            remote.name(name, digest)
        except StaleError:
            raise LibraryError(
                f"each snapshot of library {library.path} must have a name of its own",
                found=f"'{name}' is taken, by one with {len(taken[name].adapters)} adapters",
                remedy="choose another name, or remove that one: lorary library snapshots LIB --remove NAME",
            ) from None
    return next(snapshot for snapshot in list_snapshots(library.path) if snapshot.name == name)


def list_snapshots(library: Path) -> list[Snapshot]:
    """The snapshots in a library's folder, oldest first.

    Raises:
        LibraryError: if they are damaged.
    """
    snapshots = []
    with reported(library):
        remote = snapshot_remote(library)
        for name, seconds in _refs(library).items():
            head = remote.head(name)
            if head is not None:
                created = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
                adapters = sorted(adapters_of(remote.entries(head.snapshot, None)))
                snapshots.append(Snapshot(name, head.snapshot, adapters, created))
    return snapshots


def roll_back(library: Library, name: str) -> Rollback:
    """Make a library what it was, at one moment; what it is now becomes a snapshot first. Results stay.

    Args:
        library: is changed.
        name: of a snapshot.

    Raises:
        LibraryError: if there is none of that name, it or the library is damaged, or the library cannot be written.
    """
    with reported(library.path):
        digest, here, remote = _named(library, name), _scan(library), snapshot_remote(library.path)
        entries = remote.entries(digest, None)
        new = {entry: files for entry, files in entries.items() if here.entries.get(entry) != files}
        gone = sorted(set(adapters_of(here.entries)) - set(adapters_of(entries)))
        if not new and not gone:
            return Rollback(name, None, [], [])
        places = {record: path_of(entry, file) for entry, files in entries.items() for file, record in files.items()}

        def contents(files: Files) -> dict[str, bytes]:
            return {file: read_whole(remote, digest, places[record], record) for file, record in files.items()}

        for entry, files in new.items():
            check_entry(entry, contents(files), library.base)
        names = set(_refs(library.path))
        before = next(free for number in range(1, len(names) + 2) if (free := f"before-rollback-{number}") not in names)
        _take(library, here, before)
        with change(library.path, library.check_presence) as root:
            check_still(here, [*adapters_of(new), *gone])
            install(root, new, gone, contents)
    return Rollback(name, before, sorted(adapters_of(new)), gone)


def remove_snapshots(library: Library, names: Sequence[str] = ()) -> int:
    """Remove snapshots, and every object that no other snapshot needs.

    Args:
        library: stays as it is.
        names: of snapshots; with none of them, only what was left behind goes.

    Returns:
        How many bytes of objects were removed. Those that the library itself still holds take the same room as before.

    Raises:
        LibraryError: if there is no such snapshot, or the library cannot be written.
    """
    removed = 0
    with change(library.path, library.check_presence) as root:
        remote = snapshot_remote(library.path)
        for name in names:
            _named(library, name)
        if root.kind(SNAPSHOTS) is None:
            return 0
        with root.enter(SNAPSHOTS) as place, place.enter(REFS) as refs, place.enter(OBJECTS) as objects:
            for name in names:
                refs.remove_file(name)
            refs.sync()
            needed = set()
            for name in _refs(library.path):
                if head := remote.head(name):
                    needed |= remote.objects_of(head.snapshot)
            for name in objects.names():
                if name not in needed and objects.kind(name) == "file":
                    removed += os.stat(name, dir_fd=objects.descriptor, follow_symlinks=False).st_size
                    objects.remove_file(name)
    return removed


def snapshot_remote(library: Path) -> ObjectRemote:
    """The snapshots of a library as a remote."""
    folder, traffic = library / SNAPSHOTS, Traffic()
    check_tree(folder)
    return ObjectRemote(Place("file", str(folder)), FolderStore(folder, traffic), traffic)


def _refs(library: Path) -> dict[str, float]:
    """Names of snapshots with the times at which they were made, in this order."""
    folder = library / SNAPSHOTS / REFS
    times: dict[str, float] = {}
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if REF.fullmatch(entry.name) and entry.name != MAIN:
                times[entry.name] = entry.stat(follow_symlinks=False).st_mtime
    return dict(sorted(times.items(), key=lambda item: (item[1], item[0])))


def _named(library: Library, name: str) -> str:
    """The digest of a snapshot."""
    _check_name(name)
    head = snapshot_remote(library.path).head(name)
    if head is None:
        names = list(_refs(library.path))
        raise LibraryError(
            f"library {library.path} must have the snapshot that is asked for",
            found=f"none named '{name}'",
            remedy=did_you_mean(name, names, remedy=f"it has {', '.join(names[-10:]) or 'none'}"),
        )
    return head.snapshot


def _check_name(name: str) -> None:
    if not REF.fullmatch(name) or name == MAIN:
        raise UsageError(
            "the name of a snapshot must be 1 to 100 letters, digits, dots, dashes and underscores, and not 'main'",
            found=ascii(name[:200]),
            remedy="for example --name before-merge",
        )


def _files_of_adapters(entries: Entries) -> list[tuple[str, str]]:
    return [
        (f"{ADAPTERS}/{name}/{file}", record.sha256)
        for name, files in adapters_of(entries).items()
        for file, record in files.items()
    ]


def _link(path: Path, objects: Folder, sha256: str) -> None:
    """Give a file of an adapter a second name; where that cannot be, it is copied when the snapshot is published."""
    if objects.kind(sha256) is None:
        with suppress(OSError):
            os.link(path, sha256, dst_dir_fd=objects.descriptor, follow_symlinks=False)
