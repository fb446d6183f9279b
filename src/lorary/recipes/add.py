"""`lorary library add`: takes adapters of anywhere into a library; each that cannot go in is named."""

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from lorary.adapter import Adapter, content_hash
from lorary.display import Display
from lorary.errors import LibraryError, LoraryError, UsageError, did_you_mean
from lorary.library.listing import local_folder, targets_in_short
from lorary.library.nearest import Duplicate
from lorary.library.opening import created_for, is_vacant, open_or_create
from lorary.library.placing import placed_adapter
from lorary.library.source_list import ListedSource, read_source_list
from lorary.library.sources import adapter_folders
from lorary.library.store import Library

HUB = "hf://"
# Adapters of the library that were never sketched: up to so many are read, to be compared with those that are added.
MOST_READ = 200


@dataclass(frozen=True)
class FailedAdapter:
    """An adapter that could not go in.

    Args:
        path: its folder or URL.
        rule: what it breaks.
        found: the offending value.
        remedy: what to do about it.
    """

    path: str
    rule: str
    found: str | None
    remedy: str | None


@dataclass(frozen=True)
class CheckedAdapter:
    """An adapter that would go in.

    Args:
        path: its folder or URL.
        name: that it would get.
        rank: the largest of its layers.
        num_parameters: numbers in its factors.
        targets: its layers, in short.
    """

    path: str
    name: str
    rank: int
    num_parameters: int
    targets: str


@dataclass(frozen=True)
class AddResult:
    """What went into a library, or would go in.

    Args:
        library: its path.
        added: names of the adapters that went in; none where it was only checked.
        failed: those that could not go in.
        checked: those that would go in; none where they did.
        duplicates: those whose weights or direction another adapter has.
        uncompared: adapters of the library that were never sketched, with which they were not compared.
    """

    library: str
    added: list[str]
    failed: list[FailedAdapter]
    checked: list[CheckedAdapter] = field(default_factory=list)
    duplicates: list[Duplicate] = field(default_factory=list)
    uncompared: int = 0


@dataclass(frozen=True)
class _Source:
    """One adapter that is to go in.

    Args:
        where: what errors call it: its folder or URL.
        name: that it gets.
        fetch: gives the folder that holds it, and what is recorded as its origin, None for the folder's name.
        tasks: that it was trained on, None where nobody says.
    """

    where: str
    name: str
    fetch: Callable[[], tuple[Path, str | None]]
    tasks: Sequence[str] | None = None


def run_add(
    library_path: str,
    paths: Sequence[str],
    *,
    listed_in: str | None = None,
    name: str | None = None,
    tasks: Mapping[str, Sequence[str]] | None = None,
    base: str | None = None,
    force_base: bool = False,
    check_only: bool = False,
) -> AddResult:
    """Copy adapters into a library, each for itself: one that cannot go in is said, and the others go in.

    Args:
        library_path: folder of the library; made where there is none and a base is named.
        paths: folders of adapters, as `lorary.library.sources.adapter_folders` takes them, and URLs of the Hub, as
            `lorary.remote.hub_adapters` does.
        listed_in: a file that lists further ones, as `lorary.library.source_list` reads it.
        name: of the adapter, where there is one.
        tasks: by name, the tasks that an adapter was trained on.
        base: of a new library; checked against that of one that is there.
        force_base: take adapters of other weights of the same shapes.
        check_only: say what would happen, and write nothing into the library.

    Returns:
        What went in, and what did not.

    Raises:
        UsageError: if nothing is named, a name is given for several adapters, or tasks for one that is not among them.
        LibraryError: if there is no library and no base, or of several adapters none could go in.
        LoraryError: of a single adapter that is not only checked, as `Library.add`.
    """
    requests = [ListedSource(path) for path in paths] + ([] if listed_in is None else read_source_list(listed_in))
    if not requests:
        raise UsageError("there must be adapters to add", found="no path", remedy="give paths, or --from FILE")
    with (_examined if check_only else created_for)(library_path, base) as library:
        sources = list(_sources(requests, library.base.name))
        if name is not None and len(sources) > 1:
            remedy = "add that one by itself"
            raise UsageError("--name is for one adapter", found=f"{len(sources)} adapters", remedy=remedy)
        sources = [replace(source, name=name or source.name) for source in sources]
        names = [source.name for source in sources]
        if strange := sorted(set(tasks or ()) - set(names)):
            remedy = did_you_mean(strange[0], names, remedy=f"they are {', '.join(names[:10])}") or ""
            raise UsageError("--tasks must name adapters that are added", found=strange[0], remedy=remedy)
        sources = [replace(source, tasks=(tasks or {}).get(source.name, source.tasks)) for source in sources]
        if check_only:
            return replace(_check_each(library, sources, force_base=force_base), library=library_path)
        return _add_each(library, sources, force_base=force_base)


@contextmanager
def _examined(path: str, base: str | None) -> Iterator[Library]:
    """The library, or in the place of one that would be made an empty one elsewhere."""
    if base is None or not is_vacant(local_folder(path)):
        yield open_or_create(path, base)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield open_or_create(str(Path(folder) / "library"), base)


def _sources(requests: Sequence[ListedSource], base: str) -> Iterator[_Source]:
    """The adapters that paths and URLs stand for, each once; a request that stands for none is one that fails."""
    seen = set()
    for request in requests:
        try:
            sources = list(_of_hub(request, base) if request.path.startswith(HUB) else _of_folders(request))
            if request.name is not None and len(sources) > 1:
                raise UsageError("a name is for one adapter", found=f"{len(sources)} of {request.path}")
        except LoraryError as error:
            sources = [_failing(request.path, error)]
        for source in sources:
            place = source.where if source.where.startswith(HUB) else os.path.realpath(source.where)
            if place not in seen:
                seen.add(place)
                yield replace(source, name=request.name or source.name, tasks=request.tasks)


def _of_folders(request: ListedSource) -> Iterator[_Source]:
    for folder in adapter_folders([request.path]):
        yield _Source(str(folder), folder.resolve().name, partial(_here, folder))


def _here(folder: Path) -> tuple[Path, str | None]:
    return folder, None


def _fetched(fetch: Callable[[], Path], url: str) -> tuple[Path, str | None]:
    return fetch(), url


def _of_hub(request: ListedSource, base: str) -> Iterator[_Source]:
    from lorary.remote.hub_adapters import hub_adapters  # its client takes long to import

    for where, adapter in hub_adapters(request.path, base):
        if isinstance(adapter, LoraryError):
            yield _failing(where, adapter)
        else:
            yield _Source(where, adapter.name, partial(_fetched, adapter.fetch, adapter.url))


def _failing(where: str, error: LoraryError) -> _Source:
    def fail() -> tuple[Path, str | None]:
        raise error

    return _Source(where, where.rstrip("/").rpartition("/")[2], fail)


def _add_each(library: Library, sources: Sequence[_Source], *, force_base: bool) -> AddResult:
    """Those that go in, and the errors of the others, which are said at once."""
    added, failed = dict[str, str](), _Failed(library, is_said=len(sources) > 1)
    with _bar("adding adapters", len(sources)) as advance:
        for source in sources:
            try:
                _check_unlike(library, source, added)
                folder, origin = source.fetch()
                library.add(folder, source.name, tasks=source.tasks, force_base=force_base, origin=origin)
                added[source.name] = source.where
            except LoraryError as error:
                failed.add(source.where, error)
            advance(source.name)
    if not added:
        failed.raise_all(len(sources))
    try:
        duplicates, uncompared = library.duplicates_of(list(added), most_read=MOST_READ)
    except LoraryError as error:  # of an adapter that was there: these are in all the same
        Display().say(f"not compared with the adapters that were there: {error}")
        duplicates, uncompared = [], len(library)
    return AddResult(str(library.path), list(added), failed.adapters, [], duplicates, uncompared)


def _check_each(library: Library, sources: Sequence[_Source], *, force_base: bool) -> AddResult:
    """Those that would go in, and the errors of the others."""
    folders, checked, failed = dict[str, Path](), list[CheckedAdapter](), _Failed(library, is_said=True)
    seen: dict[str, str] = {}

    def examined(name: str) -> Adapter:
        with warnings.catch_warnings():  # what there is to warn of was said before
            warnings.simplefilter("ignore")
            return placed_adapter(library.examine(folders[name], name, force_base=True), library.base.fingerprint)

    def candidates() -> Iterator[tuple[str, Adapter]]:
        with _bar("checking adapters", len(sources)) as advance:
            for source in sources:
                try:
                    _check_unlike(library, source, seen)
                    folder, _ = source.fetch()
                    adapter = library.examine(folder, source.name, force_base=force_base)
                    placed = placed_adapter(adapter, library.base.fingerprint)
                except LoraryError as error:
                    failed.add(source.where, error)
                    continue
                finally:
                    advance(source.name)
                seen[source.name], folders[source.name] = source.where, folder
                targets = targets_in_short(list(placed.modules))
                checked.append(CheckedAdapter(source.where, source.name, placed.rank, placed.num_parameters, targets))
                yield content_hash(adapter.config, adapter.tensors), placed

    duplicates, uncompared = library.duplicates_beside(candidates(), examined, most_read=MOST_READ)
    return AddResult(str(library.path), [], failed.adapters, checked, duplicates, uncompared)


class _Failed:
    """The adapters that cannot go in, with their errors."""

    def __init__(self, library: Library, *, is_said: bool) -> None:
        self._library, self._is_said = library, is_said
        self._errors: dict[str, LoraryError] = {}

    def add(self, where: str, error: LoraryError) -> None:
        """One more, which is said where there are several."""
        self._errors[where] = error
        if self._is_said:
            Display().say(f"not added: {where}: {error}")

    @property
    def adapters(self) -> list[FailedAdapter]:
        """All of them."""
        return [FailedAdapter(path, error.rule, error.found, error.remedy) for path, error in self._errors.items()]

    def raise_all(self, number: int) -> NoReturn:
        """Refuse where none of so many could go in."""
        if number == 1:
            raise next(iter(self._errors.values()))
        raise LibraryError(
            f"at least one of {number} adapters must fit to go into {self._library.path}",
            found="none of them",
            remedy="see what is said of each",
        )


def _check_unlike(library: Library, source: _Source, names: Mapping[str, str]) -> None:
    """Refuse a second adapter of a name among those that are added."""
    if source.name in names:
        raise LibraryError(
            f"adapters must have names of their own, and '{source.name}' is the name of two folders",
            found=f"{names[source.name]} and {source.where}",
            remedy=f"lorary library add {library.path} {source.where} --name OTHER",
        )


@contextmanager
def _bar(title: str, number: int) -> Iterator[Callable[[str], None]]:
    """A bar where there are several."""
    if number == 1:
        yield lambda _: None
        return
    with Display().bar(title, number) as bar:
        yield bar.advance
