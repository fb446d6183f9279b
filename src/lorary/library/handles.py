"""Folders held open: what is done through one is done in it, whatever its path leads to meanwhile.

A library may come from anybody, and a symbolic link in it could lead a write to any place of this machine. So below
a library's own folder no link is followed: each folder is entered from the one above it, and each file is opened in
the folder that is held, by calls that refuse links.
"""

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from lorary.errors import LibraryError
from lorary.reading import MAX_DOCUMENT_BYTES, open_regular, read_regular, read_weights

FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
APPEND_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
Kind = Literal["folder", "file", "symbolic link", "FIFO", "socket", "device"]
_KINDS: dict[int, Kind] = {
    stat.S_IFDIR: "folder",
    stat.S_IFREG: "file",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
}


def kind_of(path: str | Path, *, folder: int | None = None) -> Kind | None:
    """What stands under a path, without following a link; None where there is nothing.

    Args:
        path: or a name in the folder.
        folder: descriptor of an open folder.

    Raises:
        OSError: if nobody may look there.
    """
    try:
        mode = os.stat(path, dir_fd=folder, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return None
    return _KINDS.get(stat.S_IFMT(mode), "device")


def check_kind(path: Path, expected: Kind, actual: Kind | None) -> None:
    """Check that a path of a library is what it has to be, or that nothing is there.

    Args:
        path: for the error.
        expected: what it has to be.
        actual: from `kind_of`.

    Raises:
        LibraryError: naming the path and what stands there.
    """
    if actual not in (None, expected):
        raise LibraryError(
            f"{path} must be readable as a plain {expected}: no link in a library is followed",
            found=f"a {actual}",
            remedy="copy what it leads to into its place"
            if actual == "symbolic link"
            else "move it out of the library",
        )


@contextmanager
def opened(path: Path, *, follow_links: bool = True) -> Iterator["Folder"]:
    """Hold a folder open.

    Args:
        path: the folder.
        follow_links: whether the last part of the path may be a symbolic link, as the path of a library may.

    Raises:
        OSError: if there is none, or it cannot be opened.
        LibraryError: if it is a link and links are not followed.
    """
    with _held(path, path, None, follow_links=follow_links) as folder:
        yield folder


@contextmanager
def _held(name: str | Path, path: Path, above: int | None, *, follow_links: bool) -> Iterator["Folder"]:
    flags = FOLDER_FLAGS | (0 if follow_links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(name, flags, dir_fd=above)
    except OSError as error:
        if not follow_links and error.errno in (errno.ELOOP, errno.ENOTDIR):
            check_kind(path, "folder", kind_of(name, folder=above))
        error.filename = str(path)
        raise
    try:
        yield Folder(path, descriptor)
    finally:
        os.close(descriptor)


class Folder:
    """A folder that is held open; made by `opened` and `Folder.enter`.

    Args:
        path: by which it was reached, for errors.
        descriptor: what holds it.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor

    @contextmanager
    def enter(self, name: str, *, make: bool = False) -> Iterator["Folder"]:
        """Hold a folder in this one.

        Args:
            name: of the folder.
            make: make it where there is nothing.

        Raises:
            LibraryError: if it is a link, or no folder.
            OSError: if there is none, or it cannot be made or opened.
        """
        if make and self.kind(name) is None:
            with suppress(FileExistsError):
                os.mkdir(name, dir_fd=self.descriptor)
            self.sync()
        with _held(name, self.path / name, self.descriptor, follow_links=False) as folder:
            yield folder

    def kind(self, name: str) -> Kind | None:
        """What stands under a name in here; None where there is nothing."""
        return kind_of(name, folder=self.descriptor)

    def check(self, name: str, expected: Kind) -> bool:
        """Whether something stands under a name.

        Raises:
            LibraryError: if it is not what it has to be.
        """
        actual = self.kind(name)
        check_kind(self.path / name, expected, actual)
        return actual is not None

    def names(self) -> list[str]:
        """All names in here, sorted."""
        return sorted(os.listdir(self.descriptor))

    def read(self, name: str, *, max_bytes: int | None = MAX_DOCUMENT_BYTES) -> bytes:
        """The bytes of a file in here; errors as for `lorary.reading.read_regular`."""
        return read_regular(self.path / name, max_bytes=max_bytes, follow_links=False, folder=self.descriptor)

    def read_content(self, name: str) -> bytes:
        """The bytes of a file in here that is weights by its name, or else a document.

        Raises:
            OSError: as for `lorary.reading.read_regular`; also for weights that are not as large as their header says.
        """
        if not name.endswith(".safetensors"):
            return self.read(name)
        path = self.path / name
        with open_regular(path, follow_links=False, folder=self.descriptor) as file:
            try:
                return read_weights(file)
            except ValueError as error:
                raise OSError(errno.EINVAL, str(error), str(path)) from error

    def write(self, name: str, data: bytes) -> None:
        """Write a new file and force its bytes to the disk; a file that was left under that name goes first.

        Raises:
            LibraryError: if something else than a file stands there.
            OSError: if it cannot be written.
        """
        self.remove_file(name)
        with os.fdopen(os.open(name, WRITE_FLAGS, 0o666, dir_fd=self.descriptor), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def replace(self, name: str, data: bytes, aside: str) -> None:
        """Replace a file atomically.

        Args:
            name: the final name.
            data: the new content.
            aside: a name in here which nobody else uses.

        Raises:
            LibraryError: if something else than a file stands under the name aside.
            OSError: if it cannot be written.
        """
        self.remove_file(aside)
        try:
            self.write(aside, data)
            os.replace(aside, name, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
            self.sync()
        finally:
            self.remove_file(aside)

    def append(self, name: str) -> int:
        """Open a file in here for appending, made where there is none; its descriptor, which the caller closes.

        A file with other names (hard links), as in a copy made by `cp -al`, gets a body of its own first: those names
        may belong to somebody else.

        Raises:
            LibraryError: if something else than a file stands there.
            OSError: if it cannot be written.
        """
        if self.check(name, "file"):
            if os.stat(name, dir_fd=self.descriptor, follow_symlinks=False).st_nlink > 1:
                self.replace(name, self.read(name, max_bytes=None), f"{name}.{os.getpid()}.tmp")
            flags = APPEND_FLAGS
        else:
            flags = APPEND_FLAGS | os.O_CREAT
        return os.open(name, flags, 0o666, dir_fd=self.descriptor)

    def move(self, name: str, target: "Folder") -> None:
        """Rename what stands under a name into another folder, and force both names to the disk."""
        os.rename(name, name, src_dir_fd=self.descriptor, dst_dir_fd=target.descriptor)
        target.sync()
        self.sync()

    def remove_file(self, name: str) -> None:
        """Remove a file, if there is one.

        Raises:
            LibraryError: if something else stands there.
        """
        if self.check(name, "file"):
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self.descriptor)

    def remove_folder(self, name: str) -> None:
        """Remove a folder and all that is in it, if there is one; links in it go, what they lead to stays.

        Raises:
            LibraryError: if something else stands there.
        """
        if self.check(name, "folder"):
            shutil.rmtree(name, dir_fd=self.descriptor)

    def sync(self) -> None:
        """Force the names in here to the disk."""
        os.fsync(self.descriptor)
