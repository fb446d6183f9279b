"""What runs on a Ray worker: one process that holds the base and works on shards, one at a time. No Ray in here."""

import os
import platform
import socket
import threading
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from io import TextIOBase
from pathlib import Path
from typing import Any

from lorary.errors import LibraryError, TrainError
from lorary.library.layout import BUILD_PID
from lorary.library.lock import holder_of
from lorary.train.attempts import WorkerFailure, attempt

# What must agree between the coordinator and a worker: shards and settings are pickled, and numbers must be the same.
PACKAGES = ("lorary", "torch", "transformers")


@dataclass(frozen=True)
class Site:
    """What coordinator and worker compare before any work is done.

    Args:
        versions: of Python and `PACKAGES`, of which results depend.
        library: folder of the library.
        holder: who holds its build lock, as its folder says; None where nobody does.
    """

    versions: dict[str, str]
    library: str
    holder: str | None


def site_of(library: str) -> Site:
    """Describe this process for comparison.

    Args:
        library: folder of the library; whether it is here and the same is seen from the holder of its build lock.
    """
    # What follows a plus is the kind of build: a coordinator without a GPU may have another.
    versions = {package: version(package).split("+")[0] for package in PACKAGES}
    holder = holder_of(Path(library) / BUILD_PID)
    python = ".".join(platform.python_version_tuple()[:2])
    return Site({"python": python, **versions}, library, holder)


def check_site(coordinator: Site, host: str) -> None:
    """Check that this process may work for a coordinator.

    Args:
        coordinator: its `site_of`.
        host: name of this machine.

    Raises:
        TrainError: if a package has another version here.
        LibraryError: if the library's folder is not the same here.
    """
    site = site_of(coordinator.library)
    for package, pinned in coordinator.versions.items():
        if site.versions[package] != pinned:
            raise TrainError(
                f"worker and coordinator must have one version of {package}",
                found=f"{site.versions[package]} on {host}, {pinned} at the coordinator",
                remedy=f"install {pinned} on {host}",
            )
    if site.holder != coordinator.holder:
        raise LibraryError(
            f"every worker must see the library's folder, {coordinator.library}",
            found=f"another folder, or none, on {host}",
            remedy="put the library on a file system that all machines mount",
        )


class Worker:
    """Works on shards in this process, which stays: what the work caches, such as the base, serves the next shard.

    `run` takes long; `take_lines` is called beside it from another thread, to show progress and that it is alive.

    Args:
        threads: of torch, per operation.
    """

    def __init__(self, threads: int) -> None:
        # Read when torch is first imported, which the work does. Every worker would take all cores otherwise.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        self._lines = Lines()

    def hello(self, coordinator: Site) -> tuple[WorkerFailure | None, str]:
        """Compare this process with the coordinator's.

        Args:
            coordinator: its `site_of`.

        Returns:
            Why this worker cannot be used, if so; its machine and process.
        """
        host = socket.gethostname()
        return attempt(lambda site: check_site(site, host), coordinator), f"{host}, process {os.getpid()}"

    def run(self, work: Callable[[Any], None], shard: Any) -> tuple[WorkerFailure | None, list[str]]:
        """Work on one shard.

        Args:
            work: what to do; lines that it writes to stderr are kept for `take_lines`.
            shard: what to do it with.

        Returns:
            What went wrong, if anything, and the last lines.
        """
        with redirect_stderr(self._lines):
            failure = attempt(work, shard)
        return failure, self.take_lines()

    def take_lines(self) -> list[str]:
        """Lines written since the last call."""
        return self._lines.take()

    def stop(self) -> None:
        """End this process at once, in the middle of its work: for when Ray itself cannot do it any more."""
        os._exit(1)


class Lines(TextIOBase):
    """A stream that keeps whole lines until they are taken. Written and read by different threads."""

    def __init__(self) -> None:
        self._text, self._lock = "", threading.Lock()

    def write(self, text: str) -> int:
        """Append text."""
        with self._lock:
            self._text += text
        return len(text)

    def take(self) -> list[str]:
        """The whole lines so far, without those taken before and without empty ones."""
        with self._lock:
            text, _, self._text = self._text.rpartition("\n")
        return [line for line in text.splitlines() if line.strip()]
