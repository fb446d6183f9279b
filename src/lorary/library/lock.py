"""Two locks of a library, one for a single change and one for a whole build, and that of a study's folder.

Both are locks of the operating system, so a process that is killed gives them back. Readers take none.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lorary.errors import LibraryError
from lorary.library.files import reported
from lorary.library.handles import Folder, opened
from lorary.library.layout import BUILD_FOLDER, LOGS, WRITE_LOCK, check_places, check_tree, check_writable
from lorary.reading import read_regular

WAIT_S = 30.0
# A process number and a line's end.
MAX_PID_BYTES = 32


@contextmanager
def write_lock(library: Path, *, wait_s: float = WAIT_S) -> Iterator[None]:
    """Hold the lock under which one change of a library is made; wait for another writer to finish its change.

    Args:
        library: the library's folder.
        wait_s: how long to wait, in seconds.

    Raises:
        LibraryError: if another process still writes after that time; the error gives its number.
        OSError: if the lock's file cannot be opened.
    """
    try:
        # Asked first, since an older filelock would follow a link, and would make a library's folder that is gone.
        with opened(library) as root:
            root.check(WRITE_LOCK, "file")
            lock = FileLock(library / WRITE_LOCK).acquire(timeout=wait_s)
            with suppress(OSError):  # it is only read by those who wait in vain
                _sign(root)
    except Timeout as error:
        raise LibraryError(
            f"one process at a time may write to library {library}",
            found=f"process {holder_of(library / WRITE_LOCK) or 'unknown'} is writing, still after {wait_s:g} s",
            remedy="wait for it to finish, or stop it",
        ) from error
    with lock:
        yield


def _sign(root: Folder) -> None:
    """Write the number of this process into the lock's file, unless that has other names in somebody else's folders."""
    descriptor = os.open(WRITE_LOCK, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root.descriptor)
    try:
        if os.fstat(descriptor).st_nlink == 1:
            os.truncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
    finally:
        os.close(descriptor)


@contextmanager
def build_lock(library: Path) -> Iterator[None]:
    """Hold the lock of a whole build, so that two builds never train the same experts side by side.

    Args:
        library: the library's folder.

    Raises:
        LibraryError: at once, if another build holds it, and the error names the process; or if something in the
            library is a link, through which the build would write.
    """
    with reported(library), opened(library) as root:
        check_places(root)
        check_writable(root)
    for name in (BUILD_FOLDER, LOGS):
        check_tree(library / name)
    with _exclusive(library, "build", f"library {library}"):
        yield


@contextmanager
def transfer_lock(library: Path) -> Iterator[None]:
    """Hold the lock of a push, a pull or a clone, whose files that have arrived are those of one process.

    Args:
        library: its folder, or that in which it is put together.

    Raises:
        LibraryError: at once, if another transfer holds it; the error names the process.
    """
    with _exclusive(library, "transfer", f"library {library}"):
        yield


@contextmanager
def study_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a study, so that two runs never move libraries and replace results under each other.

    Args:
        folder: of the study; made if need be.

    Raises:
        LibraryError: at once, if another run holds it; the error names the process.
    """
    with reported(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder, "run", f"study {folder}"):
        yield


@contextmanager
def _exclusive(folder: Path, activity: str, where: str) -> Iterator[None]:
    lock_file, pid_file = f".{activity}.lock", f".{activity}.pid"
    with ExitStack() as stack:
        with reported(folder):
            root = stack.enter_context(opened(folder))
            root.check(lock_file, "file")
            root.check(pid_file, "file")
            try:
                lock = FileLock(folder / lock_file).acquire(timeout=0)
            except Timeout as error:  # an OSError too, so it is caught before `reported` sees it
                raise LibraryError(
                    f"one {activity} at a time may run on {where}",
                    found=f"a {activity} holds it, process {holder_of(folder / pid_file) or 'unknown'}",
                    remedy=f"wait for that {activity}, or stop it: what it finished is kept",
                ) from error
        with lock, _pid_written(root, pid_file):
            yield


@contextmanager
def _pid_written(root: Folder, pid_file: str) -> Iterator[None]:
    try:
        with reported(root.path):
            root.write(pid_file, f"{os.getpid()}\n".encode())
        yield
    finally:
        with suppress(OSError, LibraryError):
            root.remove_file(pid_file)


def holder_of(pid_file: Path) -> str | None:
    """The number of the process that holds a lock, as it wrote it down; None where nothing readable is there."""
    try:
        return read_regular(pid_file, max_bytes=MAX_PID_BYTES, follow_links=False).decode("ascii", "replace").strip()
    except OSError:  # the holder is between taking the lock and writing its number, or leaving
        return None
