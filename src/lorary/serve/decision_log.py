"""The log of decisions: one line of JSON each, appended as they are made, read again without a model."""

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorary.errors import UsageError
from lorary.reading import open_regular, parse_json

# What every line of a decision has; a line of a shadow router has others.
# Longer than any entry.
MAX_LINE_BYTES = 16 * 1024 * 1024
KEYS = ("id", "time", "endpoint", "model", "router", "sentence", "is_fallback", "experts")
SHADOW_KEYS = ("id", "time", "router", "winner", "agrees")


class DecisionLog:
    """Appends decisions to a file.

    Args:
        path: of the file; made where there is none, readable by its owner alone.

    Raises:
        UsageError: if it cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self._path, self._has_failed = str(path), False
        try:
            number = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UsageError("--log must be a file that can be written", found=f"{path}: {error.strerror}") from None
        self._number = number
        if not _ends_a_line(Path(path)):  # the server before was killed while it wrote
            os.write(number, b"\n")

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append an entry in one write; a disk that is full is told of once, and stops no answer."""
        line = json.dumps(entry, ensure_ascii=True, separators=(",", ":")) + "\n"
        try:
            os.write(self._number, line.encode())
            self._has_failed = False
        except OSError as error:
            if not self._has_failed:
                message = f"decisions are lost: {self._path} cannot be written: {error.strerror}"
                warnings.warn(message, stacklevel=2)
            self._has_failed = True

    def close(self) -> None:
        """Close the file."""
        os.close(self._number)


def read_log(path: str | Path) -> Iterator[dict[str, Any]]:
    """The entries of a log, in the order in which they were written.

    A line may be half written, where the server was killed: it is told of and left out.

    Raises:
        UsageError: if the file cannot be read, or a line is JSON and no entry.
    """
    for number, line in enumerate(_lines(Path(path)), start=1):
        if len(line) > MAX_LINE_BYTES:
            raise UsageError(f"line {number} of {path} must be an entry of a log", found="a longer line than any is")
        try:
            entry = parse_json(line) if line.strip() else None
        except ValueError:
            warnings.warn(f"line {number} of {path} is not whole, and left out", stacklevel=2)
            continue
        if entry is not None:
            yield _checked(entry, f"line {number} of {path}")


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with open_regular(path) as file:
            yield from iter(lambda: file.readline(MAX_LINE_BYTES + 1), b"")
    except OSError as error:
        raise UsageError("the log must be a file that can be read", found=f"{path}: {error.strerror}") from None


def _checked(entry: Any, where: str) -> dict[str, Any]:
    keys = SHADOW_KEYS if isinstance(entry, dict) and entry.get("kind") == "shadow" else KEYS
    if not isinstance(entry, dict) or any(key not in entry for key in ("kind", *keys)):
        raise UsageError(f"{where} must be a decision as `lorary serve --log` writes it", found=repr(entry)[:80])
    return entry


def _ends_a_line(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END) if file.seek(0, os.SEEK_END) else None
        return file.read(1) in (b"", b"\n")
