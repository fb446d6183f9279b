"""Repair of a library: what `verify` finds is restored by hash from a snapshot or a remote, recorded anew or put aside.

Nothing is deleted: the folder `aside/NUMBER` keeps what was there before.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lorary.errors import LibraryError, LoraryError
from lorary.formats.peft import parse_adapter
from lorary.formats.peft_reasons import CONFIG_FILE, WEIGHTS_FILE
from lorary.library.document import parse_document, read_document
from lorary.library.files import reported
from lorary.library.folders import apply, change
from lorary.library.handles import Folder, kind_of, opened
from lorary.library.layout import ADAPTERS, ASIDE, DERIVED, LIBRARY_FILE, PROVENANCE_FILE, SNAPSHOTS, check_places
from lorary.library.listing import check_provenance, local_folder
from lorary.library.problem import Problem
from lorary.library.provenance import encode_provenance, new_provenance
from lorary.library.readers import names_in
from lorary.library.store import Library
from lorary.library.verify import KNOWN_FILES, shown_name
from lorary.reading import parse_json, read_regular
from lorary.remote.entries import LIBRARY, Entries, FileRecord, Files, path_of
from lorary.remote.opening import open_remote
from lorary.remote.place import parse_place
from lorary.remote.pull import check_entry
from lorary.remote.remotes import no_library
from lorary.remote.scan import scan
from lorary.remote.snapshots import list_snapshots, snapshot_remote
from lorary.remote.whole import read_whole

Contents = Mapping[str, bytes]


@dataclass(frozen=True)
class RepairStep:
    """What was wrong with one part of a library, and what mends it.

    Args:
        part: an adapter's name, or a path in the library's folder.
        problems: what was wrong.
        action: what is done, in words.
        is_mended: False where nothing can be done.
    """

    part: str
    problems: list[str]
    action: str
    is_mended: bool


@dataclass(frozen=True)
class Repair:
    """What a repair did, or would do.

    Args:
        library: its folder.
        steps: one for each part that was wrong.
        aside: the folder with what was there before; None where nothing was put aside.
        problems: what is wrong still; of a check, what is wrong now.
    """

    library: str
    steps: list[RepairStep]
    aside: str | None
    problems: list[Problem]


@dataclass(frozen=True)
class _Source:
    """Somewhere that a part may be whole.

    Args:
        label: in words.
        entries: what is there.
        read: bytes of a file, by its path and record, held to its sha256.
    """

    label: str
    entries: Entries
    read: Callable[[str, FileRecord], bytes]

    def contents(self, entry: str) -> dict[str, bytes]:
        """The files of an entry."""
        files: Files = self.entries[entry]
        return {file: self.read(path_of(entry, file), record) for file, record in files.items()}


@dataclass(frozen=True)
class _Mend:
    """What makes a part whole.

    Args:
        action: in words.
        place: `adapters` or `derived`.
        name: of the folder or file in it.
        contents: its new files; None where it is put aside only.
    """

    action: str
    place: str
    name: str
    contents: Callable[[], Contents] | None


def repair_library(path: str | Path, source: str | None = None, *, check: bool = False) -> Repair:
    """Mend what `verify` finds in a library.

    Args:
        path: the library's folder.
        source: a remote, or another library's folder, from which whole parts are taken; the library's snapshots are
            asked after it.
        check: only tell what would be done.

    Returns:
        What was done.

    Raises:
        UsageError: if the source is no place.
        LibraryError: if its library.json is damaged and no source has it, the source does not answer, or the library
            cannot be written.
    """
    folder = local_folder(path)
    with reported(folder):
        sources = [*(_given_source(source) if source is not None else ()), *_snapshots(folder)]
        steps = _mend_document(folder, sources, check=check)
        if steps and check:
            return Repair(str(folder), steps, None, [Problem(LIBRARY_FILE, steps[0].problems[0], "", "")])
        if not check:
            with change(folder):  # carries out, or clears, what a killed writer left
                pass
        library = Library.open(folder)
        problems = library.verify()
        plan = list(_plan(library, problems, sources))
        steps += [step for step, _ in plan]
        if check:
            return Repair(str(folder), steps, None, problems)
        aside = folder / ASIDE / _next(folder)
        if mends := [mend for _, mend in plan if mend is not None]:
            with change(folder, library.check_presence) as root:
                for mend in mends:
                    _carry_out(root, mend, aside.name)
        return Repair(str(folder), steps, str(aside) if aside.exists() else None, library.verify())


def _given_source(url: str) -> Iterator[_Source]:
    if "://" not in url and (Path(url) / LIBRARY_FILE).exists():
        here = scan(Library.open(url), results=False)
        yield _Source(f"library {url}", here.entries, here.read)
        return
    place = parse_place(url)
    remote = open_remote(place)
    head = remote.head(place.ref)
    if head is None:
        raise no_library(place)
    entries = remote.entries(head.snapshot, None)
    yield _Source(place.url, entries, partial(read_whole, remote, head.snapshot))


def _snapshots(library: Path) -> Iterator[_Source]:
    """The newest first."""
    if kind_of(library / SNAPSHOTS) is None:
        return
    remote = snapshot_remote(library)
    for snapshot in reversed(list_snapshots(library)):
        entries = remote.entries(snapshot.digest, None)
        yield _Source(f"snapshot '{snapshot.name}'", entries, partial(read_whole, remote, snapshot.digest))


def _mend_document(folder: Path, sources: list[_Source], *, check: bool) -> list[RepairStep]:
    """Restore library.json, without which nothing can be told of the rest."""
    try:
        read_document(folder)
    except LibraryError as error:
        for source in sources:
            data = source.contents(LIBRARY)[LIBRARY_FILE]
            parse_document(Path(f"{LIBRARY_FILE} of {source.label}"), data)
            if not check:
                with opened(folder) as root:
                    check_places(root)
                with change(folder) as root:
                    if root.check(LIBRARY_FILE, "file"):
                        with _aside(root, _next(folder)) as place:
                            _link(root, LIBRARY_FILE, place)
                    root.replace(LIBRARY_FILE, data, f"{LIBRARY_FILE}.new")
            return [RepairStep(LIBRARY_FILE, [_in_one_line(error)], f"restored from {source.label}", True)]
        raise
    return []


def _plan(
    library: Library, problems: list[Problem], sources: list[_Source]
) -> Iterator[tuple[RepairStep, _Mend | None]]:
    by_part: dict[str, list[Problem]] = {}
    for problem in problems:
        by_part.setdefault(problem.adapter, []).append(problem)
    names, strays = set(names_in(library.path)), _strays(library.path)
    mend: _Mend | None
    for part, wrong in by_part.items():
        place, _, name = part.partition("/")
        if place == DERIVED and name:
            again = _Mend("put aside; it is computed again when it is needed", DERIVED, name, None)
            mend = _restored(library, DERIVED, name, sources, {}) or again
        elif part in names:
            mend = _mended_adapter(library, part, sources)
        else:
            mend = _Mend("put aside", ADAPTERS, strays[part], None) if part in strays else None
        action = f"nothing at hand mends it: {wrong[0].remedy}" if mend is None else mend.action
        yield RepairStep(part, [f"{each.rule}; found: {each.found}" for each in wrong], action, mend is not None), mend


def _mended_adapter(library: Library, name: str, sources: list[_Source]) -> _Mend | None:
    """What makes a damaged adapter whole: its own files, those of a source, or a new record of its own files."""
    folder = library.path / ADAPTERS / name
    is_folder = kind_of(folder) == "folder"
    own = {file: data for file in KNOWN_FILES if is_folder and (data := _bytes_of(folder / file)) is not None}
    if is_folder and _is_whole(library, name, own):
        strays = set(os.listdir(folder)) - set(KNOWN_FILES)
        return _Mend("what does not belong there is put aside", ADAPTERS, name, lambda: own) if strays else None
    try:
        provenance = parse_json(own[PROVENANCE_FILE])
        check_provenance(name, provenance)
        recorded = {str(file): str(digest) for file, digest in provenance["files"].items()}
    except (LoraryError, KeyError, ValueError, AttributeError):
        recorded = {}
    mend = _restored(library, ADAPTERS, name, sources, recorded)
    if mend is not None or recorded or not {CONFIG_FILE, WEIGHTS_FILE} <= set(own):
        return mend
    try:
        files = {file: own[file] for file in (CONFIG_FILE, WEIGHTS_FILE)}
        base = {"name": library.base.name, "fingerprint": library.base.fingerprint.digest}
        provenance = new_provenance(parse_adapter(name, files), files, base, {"tasks": [], "source": name})
        anew = {**files, PROVENANCE_FILE: encode_provenance(name, provenance)}
    except LoraryError:
        return None
    if not _is_whole(library, name, anew):
        return None
    return _Mend("recorded anew from its own weights; its tasks are not known", ADAPTERS, name, lambda: anew)


def _is_whole(library: Library, name: str, contents: Contents) -> bool:
    try:
        check_entry(f"{ADAPTERS}/{name}", contents, library.base)
    except (LoraryError, KeyError):
        return False
    return True


def _restored(
    library: Library, place: str, name: str, sources: list[_Source], recorded: Mapping[str, str]
) -> _Mend | None:
    """The first source that has it whole, with the files of the recorded sha256 where there is a record."""
    entry = f"{place}/{name}"
    for source in sources:
        files = source.entries.get(entry)
        if files is None or any(files[file].sha256 != digest for file, digest in recorded.items() if file in files):
            continue
        try:
            check_entry(entry, source.contents(entry), library.base)
        except LoraryError:  # damaged there, too
            continue
        return _Mend(f"restored from {source.label}", place, name, partial(source.contents, entry))
    return None


def _carry_out(root: Folder, mend: _Mend, number: str) -> None:
    with root.enter(mend.place) as place, _aside(root, number) as aside, aside.enter(mend.place, make=True) as target:
        if mend.contents is None:
            place.move(mend.name, target)
            return
        os.mkdir(mend.name, dir_fd=target.descriptor)
        with target.enter(mend.name) as kept:
            if place.kind(mend.name) != "folder":  # a link, say
                place.move(mend.name, kept)
            else:
                with place.enter(mend.name) as damaged:
                    for name in damaged.names():
                        if damaged.kind(name) == "file":
                            _link(damaged, name, kept)
                        else:
                            damaged.move(name, kept)
            kept.sync()
    apply(root, [(mend.place, mend.name, mend.contents())])


@contextmanager
def _aside(root: Folder, number: str) -> Iterator[Folder]:
    """A folder for what was there before, held open."""
    with root.enter(ASIDE, make=True) as above, above.enter(number, make=True) as folder:
        yield folder


def _link(folder: Folder, name: str, target: Folder) -> None:
    """Give a file another name, or copy it where that cannot be."""
    try:
        os.link(name, name, src_dir_fd=folder.descriptor, dst_dir_fd=target.descriptor, follow_symlinks=False)
    except OSError:
        target.write(name, folder.read(name, max_bytes=None))


def _next(folder: Path) -> str:
    taken = {int(path.name) for path in (folder / ASIDE).glob("*") if path.name.isdecimal()}
    return str(max(taken, default=0) + 1)


def _strays(library: Path) -> dict[str, str]:
    """Names in the adapters' folder by how `verify` shows them."""
    return {shown_name(name): name for name in os.listdir(library / ADAPTERS)} if (library / ADAPTERS).is_dir() else {}


def _bytes_of(path: Path) -> bytes | None:
    try:
        return read_regular(path, max_bytes=None, follow_links=False)
    except OSError:
        return None


def _in_one_line(error: LoraryError) -> str:
    return f"{error.rule}; found: {error.found}"
