"""Two locks of a library, one for a single change and one for a whole build, and that of a study's folder.

Both are locks of the operating system, so a process that is killed gives them back. Readers take none.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lorary.errors import LibraryError
from lorary.library.files import reported

WRITE_LOCK, BUILD_PID = ".write.lock", ".build.pid"
WAIT_S = 30.0


@contextmanager
def write_lock(library: Path, *, wait_s: float = WAIT_S) -> Iterator[None]:
    """Hold the lock under which one change of a library is made; wait for another writer to finish its change.

    Args:
        library: the library's folder.
        wait_s: how long to wait, in seconds.

    Raises:
        LibraryError: if another process still writes after that time.
    """
    try:
        lock = FileLock(library / WRITE_LOCK).acquire(timeout=wait_s)
    except Timeout as error:
        raise LibraryError(
            f"one process at a time may write to library {library}",
            found=f"another process is writing, still after {wait_s:g} s",
            remedy="wait for it to finish, or stop it",
        ) from error
    with lock:
        yield


def build_lock(library: Path) -> AbstractContextManager[None]:
    """Hold the lock of a whole build, so that two builds never train the same experts side by side.

    Args:
        library: the library's folder.

    Raises:
        LibraryError: at once, if another build holds it; the error names the process.
    """
    return _alone(library, "build", f"library {library}")


def study_lock(folder: Path) -> AbstractContextManager[None]:
    """Hold the lock of a study, so that two runs never move libraries and replace results under each other.

    Args:
        folder: of the study; made if need be.

    Raises:
        LibraryError: at once, if another run holds it; the error names the process.
    """
    with reported(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return _alone(folder, "run", f"study {folder}")


@contextmanager
def _alone(folder: Path, what: str, where: str) -> Iterator[None]:
    pid_file = folder / f".{what}.pid"
    with reported(folder):
        try:
            lock = FileLock(folder / f".{what}.lock").acquire(timeout=0)
        except Timeout as error:  # an OSError too, so it is caught before `reported` sees it
            raise LibraryError(
                f"one {what} at a time may run on {where}",
                found=f"a {what} holds it, process {_read_pid(pid_file)}",
                remedy=f"wait for that {what}, or stop it: what it finished is kept",
            ) from error
    with lock:
        try:
            with reported(folder):
                pid_file.write_text(f"{os.getpid()}\n")
            yield
        finally:
            pid_file.unlink(missing_ok=True)


def _read_pid(pid_file: Path) -> str:
    try:
        return pid_file.read_text().strip()
    except OSError:  # the holder is between taking the lock and writing its number, or leaving
        return "unknown"
