"""Cloning a remote: a new library, whole or not there at all."""

import os
import shutil
from dataclasses import asdict
from pathlib import Path

from lorary.caching import cache_folder
from lorary.display import Display
from lorary.errors import LibraryError
from lorary.library.document import OWN_TRACES, check_vacant, parse_document
from lorary.library.files import reported, sha256, write_file, write_folder
from lorary.library.layout import LIBRARY_FILE, READ_ONLY, REMOTE, RESULTS
from lorary.library.listing import local_folder
from lorary.library.lock import transfer_lock
from lorary.remote.arrivals import Arrivals
from lorary.remote.entries import LIBRARY, adapters_of, digest_of
from lorary.remote.opening import open_remote
from lorary.remote.place import Place, parse_place
from lorary.remote.pull import ARRIVING, Arrived, PullResult, check_entry, fetch
from lorary.remote.push import KEPT
from lorary.remote.remotes import Head, Remote, moved_to, no_library
from lorary.remote.state import State, write_state


def clone_library(url: str, path: str | Path, *, results: bool = False) -> PullResult:
    """Make a library that is a copy of a remote.

    Args:
        url: where from.
        path: a folder that does not exist or is empty.
        results: clone lines of evaluations too.

    Returns:
        What came.

    Raises:
        UsageError: if the URL is none, or the path names a remote.
        LibraryError: if something is at the path already, what came is not what was pushed, or the remote does not
            answer.
        AdapterError: if an adapter that came is damaged, or does not fit the base.
        MissingExtraError: if the packages of that remote are not installed.
    """
    place, target = parse_place(url), local_folder(path)
    check_vacant(target)
    remote = open_remote(place)
    Display().say(f"clone: asking {place.url}")
    return _clone(remote, _head(remote), target, results=results, read_only=False)


def cached_copy(url: str) -> Path:
    """A copy of a remote in the cache, for reading; made where there is none of the snapshot that the ref names now.

    Args:
        url: of the remote. Where its ref is the digest of a snapshot that is here, nothing is asked of the remote.

    Returns:
        Its folder.

    Raises:
        LoraryError: as for `clone_library`.
    """
    place = parse_place(url)
    if place.is_digest and (folder := _cached(place, place.ref)).is_dir():
        return folder
    remote = open_remote(place)
    head = _head(remote)
    folder = _cached(place, head.snapshot)
    if not folder.is_dir():
        Display().say(f"clone: {place.url} into the cache")
        _clone(remote, head, folder, results=True, read_only=True)
    return folder


def _cached(place: Place, snapshot: str) -> Path:
    parent = sha256(f"{place.root}@{snapshot}".encode())[:32]
    return cache_folder() / "libraries" / parent / place.name


def _head(remote: Remote) -> Head:
    head = remote.head(remote.place.ref)
    if head is None:
        raise no_library(remote.place)
    return head


def _clone(remote: Remote, head: Head, target: Path, *, results: bool, read_only: bool) -> PullResult:
    """Everything arrives in a hidden folder beside the target, is put together there, and then renamed."""
    aside = target.parent / f".{target.name}.clone"
    with reported(target):
        aside.mkdir(parents=True, exist_ok=True)
    with reported(target), transfer_lock(aside):
        arrivals, made = Arrivals(aside / ARRIVING), aside / "library"
        entries = remote.entries(head.snapshot, aside / KEPT)
        if not entries:
            raise no_library(remote.place)
        if not results:
            entries.pop(RESULTS, None)
        fetch(remote, head.snapshot, entries, arrivals, Display(), {})
        arrived = Arrived(arrivals, None)
        document = arrived.contents(entries[LIBRARY])[LIBRARY_FILE]
        base = parse_document(Path(f"{LIBRARY_FILE} of {remote.place.root}"), document).base
        with reported(target):
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            for entry, files in entries.items():
                contents = arrived.contents(files)
                check_entry(entry, contents, base)
                if entry == LIBRARY:
                    write_file(made / LIBRARY_FILE, contents[LIBRARY_FILE])
                else:
                    write_folder(made / entry, contents)
            agreed = {entry: digest_of(files) for entry, files in entries.items() if entry != RESULTS}
            write_state(made, State(remote.place.url, {remote.place.root: agreed}))
            if read_only:
                write_file(made / REMOTE / READ_ONLY, remote.place.url.encode())
            _rename(made, target)
    shutil.rmtree(aside, ignore_errors=True)
    moved = moved_to(target, remote, head.snapshot, [])
    return PullResult(**asdict(moved), received=sorted(adapters_of(entries)))


def _rename(made: Path, target: Path) -> None:
    check_vacant(target)
    for name in OWN_TRACES:
        (target / name).unlink(missing_ok=True)
    try:
        os.rename(made, target)
    except NotADirectoryError as error:
        raise LibraryError("a new library must get a folder of its own", found=f"{target} is a file") from error
