"""Two locks of a library: one for a single change, one for a whole build.

Both are locks of the operating system, so a process that is killed gives them back. Readers take none.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lorary.errors import LibraryError
from lorary.library.files import reported

WRITE_LOCK, BUILD_LOCK, BUILD_PID = ".write.lock", ".build.lock", ".build.pid"
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


@contextmanager
def build_lock(library: Path) -> Iterator[None]:
    """Hold the lock of a whole build, so that two builds never train the same experts side by side.

    Args:
        library: the library's folder.

    Raises:
        LibraryError: at once, if another build holds it; the error names the process.
    """
    pid_file = library / BUILD_PID
    with reported(library):
        try:
            lock = FileLock(library / BUILD_LOCK).acquire(timeout=0)
        except Timeout as error:  # an OSError too, so it is caught before `reported` sees it
            raise LibraryError(
                f"one build at a time may run on library {library}",
                found=f"a build holds it, process {_read_pid(pid_file)}",
                remedy="wait for that build, or stop it: what it finished is kept",
            ) from error
    with lock:
        try:
            with reported(library):
                pid_file.write_text(f"{os.getpid()}\n")
            yield
        finally:
            pid_file.unlink(missing_ok=True)


def _read_pid(pid_file: Path) -> str:
    try:
        return pid_file.read_text().strip()
    except OSError:  # the holder is between taking the lock and writing its number, or leaving
        return "unknown"
