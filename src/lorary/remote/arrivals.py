"""What arrives from a remote: kept by sha256 until all of it is there, so that a broken transfer goes on.

NAME/SHA256         whole, of that sha256
NAME/SHA256.part    what has come of it so far
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from lorary.errors import LibraryError
from lorary.library.files import reported
from lorary.library.handles import check_kind, kind_of
from lorary.remote.entries import FileRecord
from lorary.remote.remotes import Remote
from lorary.remote.store import TransientError, retried
from lorary.remote.workers import each

# A link in a library of a stranger is not followed.
APPEND_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
CHUNK_BYTES = 8 * 1024 * 1024


class Arrivals:
    """A folder of files that have arrived.

    Args:
        folder: its place; made when something arrives.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._wrong: set[FileRecord] = set()

    def fetch(
        self, remote: Remote, snapshot: str, files: Mapping[FileRecord, str], advance: Callable[[], None]
    ) -> None:
        """Have files arrive, several at a time.

        Args:
            remote: where from.
            snapshot: digest of the snapshot that they are in.
            files: path in the library's folder by record.
            advance: called after each.

        Raises:
            LibraryError: if one does not arrive as it is recorded.
        """
        with reported(self.folder):
            check_kind(self.folder, "folder", kind_of(self.folder))
            self.folder.mkdir(parents=True, exist_ok=True)

        def arrive(record: FileRecord) -> None:
            with reported(self.folder):
                retried(lambda: self._arrive(remote, snapshot, files[record], record), remote.place.root)

        for _ in each(arrive, sorted(files)):
            advance()

    def read(self, record: FileRecord) -> bytes:
        """The bytes of a file that has arrived, held to its sha256 once more.

        Raises:
            LibraryError: if it is not what arrived.
        """
        with reported(self.folder):
            data = (self.folder / record.sha256).read_bytes()
        if FileRecord(hashlib.sha256(data).hexdigest(), len(data)) != record:
            raise LibraryError(
                f"{self.folder / record.sha256} must stay as it arrived",
                found="it was changed",
                remedy="delete it, and repeat the command",
            )
        return data

    def clear(self) -> None:
        """Remove all that has arrived: it is in force now."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _arrive(self, remote: Remote, snapshot: str, path: str, record: FileRecord) -> None:
        whole, part = self.folder / record.sha256, self.folder / f"{record.sha256}.part"
        if whole.is_file() and whole.stat().st_size == record.size:
            return
        with os.fdopen(os.open(part, APPEND_FLAGS, 0o666), "ab") as file:
            if file.tell() > record.size:
                file.truncate(0)
            while (start := file.tell()) < record.size:
                length = min(CHUNK_BYTES, record.size - start)
                data = remote.read(snapshot, path, record, start, length)
                if not data:
                    raise self._not_as_recorded(remote, path, record, f"it ends at byte {start}")
                if len(data) > length:
                    raise TransientError(f"{path} came with {len(data)} bytes in the place of {length}")
                file.write(data)
            file.flush()
        with open(part, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != record.sha256:
            os.unlink(part)
            raise self._not_as_recorded(remote, path, record, f"its sha256 is {digest}")
        os.replace(part, whole)

    def _not_as_recorded(self, remote: Remote, path: str, record: FileRecord, finding: str) -> Exception:
        """What to raise where a file is not what the index says: once it is asked for again, at once."""
        if record not in self._wrong:
            self._wrong.add(record)
            return TransientError(f"{path}: {finding}")
        return LibraryError(
            f"{path} of {remote.place.root} must arrive with the sha256 and size of its index, {record.sha256} and "
            f"{record.size:,} bytes",
            found=f"{finding}, twice",
            remedy="what lies there is damaged: push the library again to another place",
        )
