"""Pushing a library: what changed goes to the remote, joined with what others pushed meanwhile."""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from lorary.display import Display
from lorary.errors import LibraryError, UsageError
from lorary.library.files import reported
from lorary.library.layout import LIBRARY_FILE, REMOTE, RESULTS, RESULTS_FILE, check_tree
from lorary.library.lock import transfer_lock
from lorary.library.store import Library
from lorary.remote.entries import LIBRARY, Entries, FileRecord, adapters_of, check_whole, path_of, record
from lorary.remote.joining import agreed_after, check_conflicts, join
from lorary.remote.opening import open_remote
from lorary.remote.place import MAIN, Place, parse_place
from lorary.remote.remotes import Head, Moved, Push, Remote, moved_to
from lorary.remote.results import joined, read_results
from lorary.remote.scan import Scan, scan
from lorary.remote.state import read_state, write_state
from lorary.remote.store import StaleError
from lorary.remote.whole import check_base, read_whole

# Each time another push was first, so that as many at once go through.
ATTEMPTS = 30
KEPT = "index"


@dataclass(frozen=True, kw_only=True)
class PushResult(Moved):
    """What a push did.

    Args:
        sent: adapters that are new there, or changed.
    """

    sent: list[str]


def push_library(
    path: str | Path,
    url: str | None = None,
    *,
    results: bool = False,
    overwrite: bool = False,
    public: bool = False,
    card: Callable[[Library], bytes] | None = None,
) -> PushResult:
    """Push a library.

    Args:
        path: the library's folder.
        url: where to; where it was last pushed to or pulled from if None. `@NAME` behind it names the snapshot so.
        results: push lines of evaluations too.
        overwrite: where both sides changed an adapter, this library's goes.
        public: let everybody read a repository that is made for it.
        card: makes a README for people, for a remote that shows one.

    Returns:
        What went.

    Raises:
        UsageError: if the URL is none, or names a snapshot by its digest.
        LibraryError: if both sides changed an adapter, the bases differ, the library is damaged, the ref names another
            snapshot, or the remote does not answer.
        MissingExtraError: if the packages of that remote are not installed.
    """
    library = Library.open(path)
    place = place_of(library.path, url)
    if place.is_digest:
        raise UsageError("a push must go to main or make a name", found=f"the digest {place.ref[:12]}...")
    remote, display = open_remote(place, to_write=True), Display()
    display.say(f"push: reading {library.path}")
    with reported(library.path), transfer_lock(library.path):
        check_tree(library.path / REMOTE)
        here, state = scan(library, results=results), read_state(library.path)
        agreed = state.agreed.get(place.root, {})
        publisher = _Publisher(library, here, agreed, remote, display, overwrite, public, card)
        snapshot, there, before = publisher.publish()
        if place.ref != MAIN:
            _name(remote, snapshot)
        state.agreed[place.root] = agreed_after(agreed, here.entries, there)
        state.origin = place.root
        write_state(library.path, state)
    new, old = adapters_of(there), adapters_of(before)
    sent = [name for name, files in new.items() if old.get(name) != files]
    moved = moved_to(library.path, remote, snapshot, sorted(set(old) - set(new)))
    return PushResult(**asdict(moved), sent=sent)


def place_of(library: Path, url: str | None) -> Place:
    """The place that a URL names, or the one that a library was last pushed to or pulled from.

    Raises:
        UsageError: if the URL is none, or there is neither.
    """
    url = read_state(library).origin if url is None else url
    if url is None:
        raise UsageError(
            f"library {library} must have a remote", found="none so far", remedy="give its URL behind the library"
        )
    return parse_place(url)


@dataclass(frozen=True)
class _Publisher:
    """One push, which may have to join with others several times.

    Args:
        library: what is pushed.
        here: its entries.
        agreed: what both sides had last.
        remote: where to.
        display: says how it goes.
        overwrite: whether this library's entries win.
        public: whether everybody may read a repository that is made.
        card: makes a README.
    """

    library: Library
    here: Scan
    agreed: Mapping[str, str]
    remote: Remote
    display: Display
    overwrite: bool
    public: bool
    card: Callable[[Library], bytes] | None

    def publish(self) -> tuple[str, Entries, Entries]:
        """The snapshot, what it holds, and what was there before."""
        url = self.remote.place.url
        for attempt in range(ATTEMPTS):
            head = self.remote.head(MAIN)
            present = {} if head is None else self.remote.entries(head.snapshot, self.library.path / REMOTE / KEPT)
            entries, made = self._joined(head, present)
            try:
                return self._put(entries, present, made, head), entries, present
            except StaleError:
                self.display.say(f"push: another push to {url} was first; joining with it")
            time.sleep(random.random() * min(2.0, 0.05 * 2**attempt))
        raise LibraryError(
            f"{url} must hold still for a moment to be pushed to",
            found=f"another push was first, {ATTEMPTS} times",
            remedy="repeat the command: what was sent is kept",
        )

    def _joined(self, head: Head | None, present: Entries) -> tuple[Entries, dict[FileRecord, bytes]]:
        """What is to be there, and contents that are on neither side yet."""
        url = self.remote.place.url
        if head is not None and present:
            check_base(self.library.base, self.remote, head.snapshot, present, self.here.entries)
        # Of what was agreed with a remote that is empty now, nothing was removed there on purpose.
        together = join(self.agreed if present else {}, self.here.entries, present)
        if not self.overwrite:
            remedy = "pull first (--overwrite takes theirs), or push with --overwrite, which replaces theirs"
            check_conflicts(together.conflicts, self.library.path, url, remedy)
        entries, made = _with_results(together.entries, self.here, present, self.remote, head)
        check_whole(entries, f"{self.library.path} together with {url}")
        if self.remote.place.ref != MAIN:
            _check_name_is_free(self.remote, head, is_same=entries == present)
        return entries, made

    def _put(self, entries: Entries, present: Entries, made: Mapping[FileRecord, bytes], head: Head | None) -> str:
        missing = _records(entries) - _records(present)
        with self.display.bar("pushing", len(missing)) as bar:
            push = Push(
                entries, present, partial(_read, self.here, self.here.paths(), made), bar.advance, self.public,
                lambda: b"" if self.card is None else self.card(self.library), _message(entries, present),
            )  # fmt: skip
            return self.remote.publish(push, head)


def _read(here: Scan, paths: Mapping[FileRecord, str], made: Mapping[FileRecord, bytes], wanted: FileRecord) -> bytes:
    return made[wanted] if wanted in made else here.read(paths[wanted], wanted)


def _with_results(
    entries: Entries, here: Scan, present: Entries, remote: Remote, head: Head | None
) -> tuple[Entries, dict[FileRecord, bytes]]:
    """The entries with results of both sides, and the bytes that are on neither."""
    mine, theirs = here.entries.get(RESULTS), present.get(RESULTS)
    if mine is None or mine == theirs:
        return ({**entries, RESULTS: theirs} if theirs else entries), {}
    path, there = path_of(RESULTS, RESULTS_FILE), b""
    if head is not None and theirs is not None:
        there = read_whole(remote, head.snapshot, path, theirs[RESULTS_FILE])
    lines = joined([*there.split(b"\n"), *read_results(here.library).split(b"\n")])
    return {**entries, RESULTS: {RESULTS_FILE: record(lines)}}, {record(lines): lines}


def _check_name_is_free(remote: Remote, head: Head | None, *, is_same: bool) -> None:
    named = remote.head(remote.place.ref)
    if named is not None and not (is_same and head is not None and named.snapshot == head.snapshot):
        raise _taken(remote, named.snapshot)


def _name(remote: Remote, snapshot: str) -> None:
    try:
        remote.name(remote.place.ref, snapshot)
    except StaleError:
        raise _taken(remote, "another one") from None


def _taken(remote: Remote, snapshot: str) -> LibraryError:
    return LibraryError(
        f"a ref other than {MAIN} must name one snapshot for ever",
        found=f"{remote.place.url} names {snapshot[:12]} already",
        remedy="choose another name",
    )


def _records(entries: Entries) -> set[FileRecord]:
    return {each for files in entries.values() for each in files.values()}


def _message(entries: Entries, present: Entries) -> str:
    new, old = adapters_of(entries), adapters_of(present)
    added, removed = sorted(set(new) - set(old)), sorted(set(old) - set(new))
    changed = sorted(name for name in set(new) & set(old) if new[name] != old[name])
    words = [f"{len(names)} {word}" for word, names in (("added", added), ("changed", changed), ("removed", removed))
             if names]  # fmt: skip
    router = [] if entries.get(LIBRARY) == present.get(LIBRARY) or not present else [f"{LIBRARY_FILE} changed"]
    return "Adapters: " + ", ".join([*words, *router]) if words or router else "Push of a library"
