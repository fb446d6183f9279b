"""Pulling from a remote: what changed there comes into a library, checked, unless it changed here too."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from lorary.display import Display
from lorary.errors import LibraryError
from lorary.library.base import BaseRecord
from lorary.library.derived import check_derived
from lorary.library.document import parse_document
from lorary.library.files import reported
from lorary.library.folders import apply, change
from lorary.library.handles import Folder
from lorary.library.layout import ADAPTERS, DERIVED, LIBRARY_FILE, REMOTE, RESULTS, RESULTS_FILE, check_tree
from lorary.library.lock import transfer_lock
from lorary.library.readers import stamps_of
from lorary.library.store import Library
from lorary.library.verify import check_arrived
from lorary.remote.arrivals import Arrivals
from lorary.remote.entries import LIBRARY, Entries, FileRecord, Files, adapters_of, check_whole, path_of
from lorary.remote.joining import agreed_after, check_conflicts, join
from lorary.remote.opening import open_remote
from lorary.remote.push import KEPT, place_of
from lorary.remote.remotes import Moved, Remote, moved_to, no_library
from lorary.remote.results import append_results, joined, read_results
from lorary.remote.scan import Scan, scan
from lorary.remote.state import read_state, write_state
from lorary.remote.whole import check_base

ARRIVING = "arriving"


@dataclass(frozen=True, kw_only=True)
class PullResult(Moved):
    """What a pull or a clone did.

    Args:
        received: adapters that are new here, or changed.
    """

    received: list[str]


def pull_library(
    path: str | Path, url: str | None = None, *, results: bool = False, overwrite: bool = False
) -> PullResult:
    """Pull a remote into a library.

    Args:
        path: the library's folder.
        url: where from; where it was last pushed to or pulled from if None.
        results: pull lines of evaluations too.
        overwrite: where both sides changed an adapter, the remote's comes.

    Returns:
        What came.

    Raises:
        UsageError: if the URL is none.
        LibraryError: if both sides changed an adapter, what came is not what was pushed, or the remote does not answer.
        AdapterError: if an adapter that came is damaged, or does not fit the base.
        BaseModelError: if the bases differ.
        MissingExtraError: if the packages of that remote are not installed.
    """
    library = Library.open(path)
    place = place_of(library.path, url)
    remote, display = open_remote(place), Display()
    display.say(f"pull: reading {library.path}")
    with reported(library.path), transfer_lock(library.path):
        check_tree(library.path / REMOTE)
        # What a killed writer left is carried out before the scan, and not under it.
        with change(library.path, library.check_presence) as root, root.enter(REMOTE, make=True):
            pass
        here, state = scan(library, results=results), read_state(library.path)
        head = remote.head(place.ref)
        if head is None:
            raise no_library(place)
        there = remote.entries(head.snapshot, library.path / REMOTE / KEPT)
        if not there:
            raise no_library(place)
        check_base(library.base, remote, head.snapshot, there, here.entries)
        agreed = state.agreed.get(place.root, {})
        together = join(agreed, there, here.entries)
        if not overwrite:
            remedy = "push first (--overwrite takes this library's), or pull with --overwrite, which replaces them here"
            check_conflicts(together.conflicts, library.path, place.url, remedy)
        check_whole(together.entries, f"{library.path} together with {place.url}")
        new = {entry: files for entry, files in together.entries.items() if here.entries.get(entry) != files}
        if results and RESULTS in there and there[RESULTS] != here.entries.get(RESULTS):
            new[RESULTS] = there[RESULTS]
        arrivals = Arrivals(library.path / REMOTE / ARRIVING)
        fetch(remote, head.snapshot, new, arrivals, display, here.paths())
        arrived = Arrived(arrivals, here)
        for entry, files in new.items():
            check_entry(entry, arrived.contents(files), library.base)
        gone = sorted(set(adapters_of(here.entries)) - set(adapters_of(together.entries)))
        with change(library.path, library.check_presence) as root:
            check_still(here, [*adapters_of(new), *gone])
            install(root, new, gone, arrived.contents)
        state.agreed[place.root] = agreed_after(agreed, {**here.entries, **together.entries}, there)
        state.origin = place.root
        write_state(library.path, state)
        arrivals.clear()
    moved = moved_to(library.path, remote, head.snapshot, gone)
    return PullResult(**asdict(moved), received=sorted(adapters_of(new)))


def fetch(
    remote: Remote, snapshot: str, new: Entries, arrivals: Arrivals, display: Display, here: Mapping[FileRecord, str]
) -> None:
    """Have the files of entries arrive, but those that are here under whatever name."""
    files = {record: path_of(entry, file) for entry, named in new.items() for file, record in named.items()}
    missing = {record: path for record, path in files.items() if record not in here}
    with display.bar("pulling", len(missing)) as bar:
        arrivals.fetch(remote, snapshot, missing, bar.advance)


class Arrived:
    """Contents of entries, from what has arrived and what was here.

    Args:
        arrivals: what has arrived.
        here: the library; None for a new one.
    """

    def __init__(self, arrivals: Arrivals, here: Scan | None) -> None:
        self._arrivals, self._here = arrivals, here
        self._paths = {} if here is None else here.paths()

    def contents(self, files: Files) -> dict[str, bytes]:
        """Content by file name, held to its sha256."""
        return {file: self._read(record) for file, record in files.items()}

    def _read(self, record: FileRecord) -> bytes:
        if self._here is not None and record in self._paths:
            return self._here.read(self._paths[record], record)
        return self._arrivals.read(record)


def check_entry(entry: str, contents: Mapping[str, bytes], base: BaseRecord) -> None:
    """Check what has arrived as strictly as what is added by hand.

    Raises:
        LoraryError: saying what is wrong with it.
    """
    place, _, name = entry.partition("/")
    if place == ADAPTERS:
        check_arrived(name, contents, base)
    elif place == DERIVED:
        check_derived(name, contents)
    elif place == LIBRARY:
        parse_document(Path(f"{LIBRARY_FILE} of the remote"), contents[LIBRARY_FILE])


def check_still(here: Scan, names: list[str]) -> None:
    """Check, under the lock, that adapters are still those that were scanned.

    Args:
        here: the scan.
        names: of adapters, also of such as were not there.

    Raises:
        LibraryError: naming the first that was changed.
    """
    stamps = stamps_of(here.library)
    spellings = {name.casefold(): name for name in stamps}
    if changed := sorted(
        name
        for name in names
        if stamps.get(name) != here.stamps.get(name) or spellings.get(name.casefold(), name) != name
    ):
        raise LibraryError(
            f"library {here.library} must stay as it is meanwhile",
            found=f"adapter '{changed[0]}' was changed",
            remedy="repeat the command: what has arrived is kept",
        )


def install(root: Folder, new: Entries, gone: list[str], contents: Callable[[Files], dict[str, bytes]]) -> None:
    """Put entries in place, inside `change`: lines of results first, which take nothing away; then all else at once.

    Args:
        root: the library's folder, from `change`.
        new: entries that come, or take the place of those of their names.
        gone: names of adapters that are removed.
        contents: gives the files of an entry, checked.
    """
    if RESULTS in new:
        lines = joined(contents(new[RESULTS])[RESULTS_FILE].split(b"\n")).splitlines()
        there = set(read_results(root.path).splitlines())
        append_results(root, [line for line in lines if line not in there])
    document = contents(new[LIBRARY])[LIBRARY_FILE] if LIBRARY in new else None
    folders = (
        (place, name, contents(files))
        for place, name, files in ((*entry.partition("/")[::2], files) for entry, files in new.items())
        if place in (ADAPTERS, DERIVED)
    )
    if gone or set(new) - {RESULTS}:
        apply(root, folders, gone, document)
