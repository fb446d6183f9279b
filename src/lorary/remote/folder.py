"""A remote in a local folder, or in one that a network mounts."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lorary.errors import LibraryError
from lorary.library.files import replace_file
from lorary.library.handles import opened
from lorary.library.layout import LIBRARY_FILE
from lorary.reading import open_regular, read_regular
from lorary.remote.store import AbsentError, Fetched, StaleError, Traffic, TransientError

LOCK = ".lock"
REFS = "refs/"
WAIT_S = 30.0


class FolderStore:
    """Objects as files; each appears whole or not at all.

    Args:
        root: the folder; made when something is put into it.
        traffic: where requests are counted.

    Raises:
        LibraryError: if the folder is a library itself.
    """

    def __init__(self, root: Path, traffic: Traffic) -> None:
        with _reported(root):
            is_library = (root / LIBRARY_FILE).exists()
        if is_library:
            raise LibraryError(
                f"{root} must be a remote, which holds a library as objects",
                found="a library itself",
                remedy="give another folder to push to; open this one as it is",
            )
        self._root, self._traffic = root, traffic

    def get(self, key: str) -> Fetched:
        """An object; its etag is its sha256."""
        with _reported(self._root):
            data = read_regular(self._root / key)
        self._traffic.add(received=len(data))
        return Fetched(data, hashlib.sha256(data).hexdigest())

    def read(self, key: str, start: int, length: int) -> bytes:
        """A part of an object."""
        with _reported(self._root), open_regular(self._root / key) as file:
            file.seek(start)
            data = file.read(length)
        self._traffic.add(received=len(data))
        return data

    def size(self, key: str) -> int | None:
        """The size of a file."""
        self._traffic.add()
        try:
            with _reported(self._root):
                return (self._root / key).stat().st_size
        except AbsentError:
            return None

    def list(self, prefix: str) -> dict[str, int]:
        """The files below a folder."""
        self._traffic.add()
        folder = self._root / prefix
        try:
            with _reported(self._root), os.scandir(folder) as entries:
                return {f"{prefix}{entry.name}": entry.stat().st_size for entry in entries if entry.is_file()}
        except AbsentError:
            return {}

    def create(self, key: str, data: bytes) -> bool:
        """Write aside, and link to the final name, which fails where there is one."""
        path = self._root / key
        aside = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
        with _reported(self._root):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._settle(key)
            try:
                with open(aside, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.link(aside, path)
            except FileExistsError:
                return False
            finally:
                aside.unlink(missing_ok=True)
            if key.startswith(REFS):
                _sync(path.parent)
        self._traffic.add(sent=len(data))
        return True

    def replace(self, key: str, data: bytes, etag: str) -> None:
        """Compare and replace under a lock."""
        path = self._root / key
        with self._locked():
            if self.get(key).etag != etag:
                raise StaleError
            with _reported(self._root):
                self._settle(key)
                replace_file(path, data, path.with_name(f".{path.name}.new"))
        self._traffic.add(sent=len(data))

    def _settle(self, key: str) -> None:
        """Force the names of objects to the disk before a ref leads to them."""
        if key.startswith(REFS):
            for folder in (self._root / "objects", self._root):
                if folder.is_dir():
                    _sync(folder)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            with FileLock(self._root / LOCK, timeout=WAIT_S):
                yield
        except Timeout:
            raise TransientError(f"another process writes, still after {WAIT_S:g} s") from None


def _sync(folder: Path) -> None:
    with opened(folder) as held:
        held.sync()


@contextmanager
def _reported(root: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AbsentError(str(error.filename)) from error
    except FileExistsError:
        raise
    except OSError as error:
        raise LibraryError(
            f"remote {root} must be readable and writable",
            found=f"{error.filename or root}: {error.strerror or error}",
            remedy="repair the folder and repeat the command: nothing is half-written",
        ) from error
