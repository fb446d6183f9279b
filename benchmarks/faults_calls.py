"""Faults at system calls: the functions of `os` and `io` that reach the disk, counted, and made to fail at chosen ones.

Files are opened through a raw layer written here, so that each write that Python's buffers make is a call that can
fail, be short, or be the last thing that the process does. `install` changes a process for good: it is meant for one
that was forked for a single fault.
"""

import builtins
import errno
import io
import os
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

READING = ("stat", "lstat", "fstat", "listdir", "scandir", "read")
WRITING = ("write", "mkdir", "rename", "replace", "link", "unlink", "rmdir", "fsync", "truncate", "ftruncate")
CALLS = ("open", *READING, *WRITING)
# What stands in the way of a call: it dies before or after it; the power fails; the call fails before or after its
# work; half of a write is done, with and without an end; from here on there is no room.
DEATHS = ("killed before", "killed after", "power cut")
TORN = ("short write", "torn write", "short write, then no room")
ERRORS = {"EIO": errno.EIO, "EACCES": errno.EACCES, "ENOSPC": errno.ENOSPC, "EIO after its work": errno.EIO}
DISK_FULL = "no room from here on"
NEEDS_ROOM = ("write", "mkdir", "rename", "replace", "link", "fsync")


def kinds_for(call: str) -> tuple[str, ...]:
    """The faults that can come to a call."""
    if call == "end":
        return ("power cut",)
    if call in READING:  # to die here is to die before the next call that changes something
        return ("EIO",)
    kinds: tuple[str, ...] = (*DEATHS, "EIO", "EACCES")
    if call in WRITING:
        kinds = (*kinds, "EIO after its work")
    if call in NEEDS_ROOM:
        kinds = (*kinds, "ENOSPC", DISK_FULL)
    if call == "write":
        kinds = (*kinds, *TORN)
    return kinds


@dataclass
class Calls:
    """The system calls of a process from now on.

    Args:
        faults: kind by number of the call, counted from 0.
        place: only calls in this folder and below count.

    Attributes:
        names: of the calls so far.
        came: whether any fault has come.
    """

    faults: Mapping[int, str]
    place: str
    names: list[str] = field(default_factory=list)
    came: bool = False
    is_full: bool = False
    short: set[int] = field(default_factory=set)
    # Files that were written and not forced to the disk, with the length that is there for sure.
    unforced: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.RLock)

    def __call__(self, name: str, act: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """Do a call, or what stands in its way."""
        target = keywords.pop("descriptor", arguments[0] if arguments else self.place)
        if not self._is_in_place(target, keywords):
            return act(*arguments, **keywords)
        with self.lock:
            number = len(self.names)
            self.names.append(name)
            kind = self.faults.get(number)
            if kind is None:
                if self.is_full and name in NEEDS_ROOM:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return act(*arguments, **keywords)
            self.came = True
            if kind == "power cut":
                self.cut()
            if kind == "killed before":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == DISK_FULL:
                self.is_full = True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if kind in ERRORS and kind != "EIO after its work":
                raise OSError(ERRORS[kind], os.strerror(ERRORS[kind]))
            if kind in TORN and name == "write":
                data = bytes(arguments[0])
                written = act(data[: max(1, len(data) // 2)])
                if kind == "torn write":
                    os.kill(os.getpid(), signal.SIGKILL)
                self.is_full = kind != "short write"
                return written
            result = act(*arguments, **keywords)
            if kind == "killed after":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "EIO after its work":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return result

    def _is_in_place(self, target: Any, keywords: Mapping[str, Any]) -> bool:
        folder = keywords.get("dir_fd") or keywords.get("src_dir_fd")
        if isinstance(target, int) or folder is not None:
            with suppress(OSError):
                return os.readlink(f"/proc/self/fd/{target if folder is None else folder}").startswith(self.place)
            return False
        return os.path.abspath(os.fspath(target)).startswith(self.place)

    def cut(self) -> None:
        """The power fails: of files that were not forced to the disk, what was written is gone."""
        for descriptor, length in self.unforced.values():
            _ORIGINAL["ftruncate"](descriptor, length)
        os.kill(os.getpid(), signal.SIGKILL)

    def wrote(self, descriptor: int) -> None:
        """Note a file that is about to be written."""
        status = _ORIGINAL["fstat"](descriptor)
        key = (status.st_dev, status.st_ino)
        if key not in self.unforced:
            # Held open by a descriptor of its own: the file may be renamed or closed meanwhile.
            held = _ORIGINAL["open"](f"/proc/self/fd/{descriptor}", os.O_WRONLY)
            self.unforced[key] = (held, status.st_size)

    def forced(self, descriptor: int) -> None:
        """Note that a file is on the disk."""
        status = _ORIGINAL["fstat"](descriptor)
        if entry := self.unforced.pop((status.st_dev, status.st_ino), None):
            os.close(entry[0])


_ORIGINAL: dict[str, Any] = {name: getattr(os, name) for name in CALLS if name not in ("read", "write")}
_OPEN = io.open


class _Raw(io.FileIO):
    """The lowest layer of a file; its calls are counted."""

    calls: Calls

    def write(self, data: Any) -> int:
        self.calls.wrote(self.fileno())
        return int(self.calls("write", super().write, data, descriptor=self.fileno()))

    def readinto(self, buffer: Any) -> int | None:
        return self.calls("read", super().readinto, buffer, descriptor=self.fileno())  # type: ignore[no-any-return]

    def readall(self) -> bytes:
        return self.calls("read", super().readall, descriptor=self.fileno())  # type: ignore[no-any-return]

    def truncate(self, size: int | None = None) -> int:
        return int(self.calls("truncate", super().truncate, size, descriptor=self.fileno()))


def install(faults: Mapping[int, str], place: str) -> Calls:
    """Count the system calls of this process from now on, and let faults come to some of them.

    Args:
        faults: kind by number of the call.
        place: only calls in this folder and below count.

    Returns:
        What keeps count.
    """
    calls = Calls(faults, place)

    def counted(name: str) -> Callable[..., Any]:
        original = _ORIGINAL[name]

        def call(*arguments: Any, **keywords: Any) -> Any:
            result = calls(name, original, *arguments, **keywords)
            if name == "fsync":
                calls.forced(arguments[0])
            return result

        return call

    for name in _ORIGINAL:
        setattr(os, name, counted(name))

    class Raw(_Raw):
        pass

    Raw.calls = calls

    def opened(
        file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
        newline: Any = None, closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        opener = opener or (lambda path, flags: os.open(path, flags, 0o666))
        raw = Raw(file, mode.replace("b", "").replace("t", ""), closefd, None if isinstance(file, int) else opener)
        if buffering == 0:
            return raw
        buffered: Any = io.BufferedRandom if "+" in mode else io.BufferedReader if "r" in mode else io.BufferedWriter
        stream = buffered(raw)
        return stream if "b" in mode else io.TextIOWrapper(stream, encoding, errors, newline)

    builtins.open = io.open = opened  # type: ignore[assignment]
    return calls
