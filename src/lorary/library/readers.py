"""Reading adapters beside a writer: each as of one moment, and all of them together as of one moment too.

A reader takes no lock and changes nothing. It compares what folders say of themselves before and after it reads, and
reads again what a writer has changed meanwhile.
"""

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from lorary.errors import LibraryError, LoraryError
from lorary.formats.peft_reasons import CONFIG_FILE, WEIGHTS_FILE
from lorary.library.folders import COMMITTED, GONE, NAME, check_name, no_adapter
from lorary.library.handles import FOLDER_FLAGS, Folder, check_kind, kind_of, opened
from lorary.library.layout import ADAPTERS, PROVENANCE_FILE, STAGING

# Each attempt meets another replacement in the very moment of reading, so a second one is rare already.
READ_ATTEMPTS = 100
FILES = (CONFIG_FILE, WEIGHTS_FILE, PROVENANCE_FILE)

Read = TypeVar("Read")
Identity = tuple[int, int, int]


def names_in(library: Path, place: str = ADAPTERS) -> list[str]:
    """The names of all adapters, or of all folders of another place, in canonical order.

    A link among them is named too, so that whoever asks for it hears what it is. Folders move while a change is carried
    out, so they are looked at until nothing moved meanwhile.

    Raises:
        LibraryError: if one of the folders is a link, or cannot be read.
    """
    names: set[str] = set()
    for _ in range(READ_ATTEMPTS):
        before = _moment(library, place)
        coming, gone = set[str](), set[str]()
        if _is_pending(before):  # looked at first: what has moved to its place meanwhile is met there
            coming = set(_folders_in(library, STAGING, COMMITTED, place))
            gone = set(_folders_in(library, STAGING, COMMITTED, GONE)) if place == ADAPTERS else gone
        names = (set(_folders_in(library, place)) - gone) | coming
        if _moment(library, place) == before:
            break
    return sorted(names)


Moment = tuple["Identity | None", "Identity | None"]


def _moment(library: Path, place: str) -> Moment:
    """What changes whenever a folder of a place comes, goes or moves."""
    return _identity(library / place), _identity(library / STAGING / COMMITTED)


def _is_pending(moment: Moment) -> bool:
    """Whether a change was in force then that was not carried out yet."""
    return moment[1] is not None


def _folders_in(library: Path, *way: str) -> list[str]:
    try:
        with _entered(library, *way) as folder, os.scandir(folder.descriptor) as entries:
            return [
                entry.name
                for entry in entries
                if NAME.fullmatch(entry.name) and (entry.is_symlink() or entry.is_dir(follow_symlinks=False))
            ]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise LibraryError(
            f"{library.joinpath(*way)} must be readable",
            found=error.strerror,
            remedy="give yourself the right to read it",
        ) from error


@contextmanager
def _entered(library: Path, *way: str) -> Iterator[Folder]:
    with ExitStack() as stack:
        folder = stack.enter_context(opened(library))
        for name in way:
            folder = stack.enter_context(folder.enter(name))
        yield folder


def stamps_of(library: Path) -> dict[str, Identity | None]:
    """What tells each adapter from a successor of its name, in the canonical order of names."""
    return {name: _identity_of(library, name) for name in names_in(library)}


def locate(library: Path, name: str) -> Path:
    """The folder that holds an adapter right now.

    Raises:
        UsageError: if the name can be no adapter's.
        LibraryError: if there is none of that name, or a link in its place.
    """
    check_name(name)
    folder = find_folder(library, ADAPTERS, name)
    if folder is None:
        raise no_adapter(library, name, names_in(library))
    return folder


def find_folder(library: Path, place: str, name: str) -> Path | None:
    """The folder of that name in a place of the library right now; None where there is none.

    Raises:
        LibraryError: if there is a link in its place.
    """
    committed = library / STAGING / COMMITTED
    for _ in range(READ_ATTEMPTS):
        before = _moment(library, place)
        for _ in range(2):  # between two looks a change may be carried out within one tick of the clock
            if _is_pending(before):
                if is_folder(library, committed / place / name):
                    return committed / place / name
                if place == ADAPTERS and is_folder(library, committed / GONE / name):
                    return None
            if is_folder(library, library / place / name):
                return library / place / name
        if _moment(library, place) == before:
            break
    return None


def is_folder(library: Path, path: Path) -> bool:
    """Whether there is a folder in a library, reached by folders alone.

    Raises:
        LibraryError: if there is something else on the way, or nobody may look there.
    """
    parts = path.relative_to(library).parts
    for number in range(1, len(parts) + 1):
        part = library.joinpath(*parts[:number])
        try:
            kind = kind_of(part)
        except OSError as error:
            raise LibraryError(f"{part} must be readable", found=error.strerror) from error
        check_kind(part, "folder", kind)
        if kind is None:
            return False
    return True


def read_stable(library: Path, name: str, read: Callable[[Path], Read]) -> Read:
    """Read several files of one adapter as of one moment, though a writer may replace it meanwhile.

    Args:
        library: the library's folder.
        name: the adapter's name.
        read: reads what is wanted from the adapter's folder; called again if the folder changed under it.

    Raises:
        LoraryError: as `locate` and `read` raise it; also if a file of the adapter is a link, a FIFO or a device.
    """
    return _read_identified(library, name, lambda folder, _: read(folder))[1]


def read_all(library: Path, read: Callable[[Path, str], Read]) -> dict[str, Read | LoraryError]:
    """Read something of every adapter, all as of one moment.

    Args:
        library: the library's folder.
        read: reads what is wanted of an adapter from its folder.

    Returns:
        By name, in canonical order: what was read, or why it cannot be read, as for `read_stable`.

    Raises:
        LibraryError: if the library cannot be read, or never holds still.
    """
    readings: dict[str, tuple[Identity | None, Read | LoraryError]] = {}
    for _ in range(READ_ATTEMPTS):
        names = names_in(library)
        still = _still(library, {name: readings[name][0] for name in names if name in readings})
        readings = {name: readings[name] for name in names if name in still}
        missing = [name for name in names if name not in readings]
        if not missing:
            return {name: readings[name][1] for name in names}
        readings.update(_read_at_rest(library, missing, read))
        for name in missing:
            if name in readings:
                continue
            # Taken before: an adapter that comes back after the error has another one, and is read anew.
            before = _identity_of(library, name)
            try:
                readings[name] = _read_identified(library, name, read)
            except LoraryError as error:
                readings[name] = before, error  # left out by the next look if somebody removed it meanwhile
    raise LibraryError(
        f"the adapters of library {library} must hold still to be read together",
        found=f"some were replaced during each of {READ_ATTEMPTS} attempts",
        remedy="stop the process that keeps writing to it",
    )


@contextmanager
def _adapters(library: Path) -> Iterator[Folder | None]:
    """The folder of the adapters, held open; None where there is none, or it cannot be entered."""
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(_entered(library, ADAPTERS))
        except (LibraryError, OSError):
            yield None
            return
        yield folder


def _is_changing(library: Path) -> bool:
    """Whether a change is in force that is not carried out yet."""
    staging = library / STAGING
    check_kind(staging, "folder", kind_of(staging))
    return kind_of(staging / COMMITTED) is not None


def _still(library: Path, identities: Mapping[str, Identity | None]) -> set[str]:
    """Which adapters are those that were read, or that could not be."""
    with _adapters(library) as adapters:
        in_place = {
            name
            for name, identity in identities.items()
            if adapters is not None and identity is not None and _identity(name, adapters) == identity
        }
    if _is_changing(library):
        in_place = set()
    return {name for name, identity in identities.items() if name in in_place or _is_still(library, name, identity)}


def _read_at_rest(
    library: Path, names: Sequence[str], read: Callable[[Path, str], Read]
) -> dict[str, tuple[Identity | None, Read | LoraryError]]:
    """What can be read of adapters that lie in their place and hold still, as nearly all do.

    It costs a few calls an adapter. For any other adapter there is no answer here: `_read_identified` finds out why.
    """
    readings: dict[str, tuple[Identity | None, Read | LoraryError]] = {}
    with _adapters(library) as adapters:
        # While a change is in force that is not carried out, what lies in the place need not be what is in force.
        if adapters is None or _is_changing(library):
            return {}
        for name in names:
            with suppress(LoraryError, OSError):
                descriptor = os.open(name, FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=adapters.descriptor)
                try:
                    before = _identity_of_stat(os.fstat(descriptor))
                    if all(kind_of(file, folder=descriptor) in ("file", None) for file in FILES):
                        result = read(adapters.path / name, name)
                        if _identity(name, adapters) == before:
                            readings[name] = before, result
                finally:
                    os.close(descriptor)
        # What was read by paths came from the folder that is held only if that has still its path.
        held, now = os.fstat(adapters.descriptor), _identity(library / ADAPTERS)
        if now is None or now[:2] != (held.st_dev, held.st_ino):
            return {}
    return readings


def _read_identified(library: Path, name: str, read: Callable[[Path, str], Read]) -> tuple[Identity, Read]:
    for _ in range(READ_ATTEMPTS):
        folder, before = locate(library, name), None
        try:
            # Held open, so that no successor gets its number; and a folder that was moved aside is believed only as
            # long as it has no successor, since it is deleted then.
            with opened(folder, follow_links=False):
                before = _identity(folder)
                try:
                    _check_files(folder)
                    result = read(folder, name)
                except (LoraryError, OSError):
                    # A folder that was moved aside keeps its times within one tick of the clock: look where it is, too.
                    if before is not None and _is_still(library, name, before) and _place(library, name) == folder:
                        raise
                    continue
                if before is not None and _is_still(library, name, before):
                    return before, result
        except OSError as error:
            was_replaced = before is None and error.errno == errno.ENOENT  # between the look and the opening
            if not was_replaced and _identity(folder) is not None:
                raise LibraryError(
                    f"{error.filename or folder} must be readable",
                    found=error.strerror,
                    remedy="restore it from a copy, or give yourself the right to read it",
                ) from error
    raise LibraryError(
        f"adapter '{name}' of library {library} must hold still to be read",
        found=f"replaced during each of {READ_ATTEMPTS} attempts",
        remedy="stop the process that keeps writing to it",
    )


def _check_files(folder: Path) -> None:
    for file in FILES:
        check_kind(folder / file, "file", kind_of(folder / file))


def _is_still(library: Path, name: str, identity: Identity | None) -> bool:
    """Whether an adapter is the one that was read, or that could not be."""
    return identity is not None and _identity_of(library, name) == identity


def _identity_of(library: Path, name: str) -> Identity | None:
    return _identity(_place(library, name))


def _place(library: Path, name: str) -> Path:
    """Where an adapter lies; where it would lie if it does not, or cannot be told."""
    try:
        return locate(library, name)
    except LibraryError:
        return library / ADAPTERS / name


def _identity(folder: str | Path, above: Folder | None = None) -> Identity | None:
    """What changes with a folder's successor; of a path, or of a name in a folder that is held."""
    try:
        stat = os.stat(folder, dir_fd=None if above is None else above.descriptor, follow_symlinks=False)
    except OSError:
        return None
    return _identity_of_stat(stat)


def _identity_of_stat(stat: os.stat_result) -> Identity:
    return stat.st_dev, stat.st_ino, stat.st_ctime_ns
