"""Rows out of a JSONL file: streamed, and every line checked."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from lorary.data.schema import Row, parse_row, shorten
from lorary.errors import TaskError, UsageError
from lorary.reading import first_twice, open_regular

UTF8_BOM = b"\xef\xbb\xbf"
# More than any row of text has. A line is held in memory, and what is parsed takes a multiple of it.
MAX_LINE_BYTES = 16 * 1024 * 1024
# Memory that the values of a small document may take, as far as its signs tell. Those of a large one may take a
# multiple of its size, as rows of text do.
MAX_VALUE_BYTES, BYTES_PER_BYTE = 64 * 1024 * 1024, 8
# What an object of a few keys, a list, a value and each further key take. Keys that come again are kept once.
OBJECT_BYTES, FEW_KEYS, LIST_BYTES, VALUE_BYTES, KEY_BYTES = 300, 20, 80, 60, 250


def iter_rows(path: str | Path) -> Iterator[Row]:
    """Stream the rows of a JSONL file; blank lines and a byte order mark are passed over.

    The file is cut at line feeds only, as bytes, so that the line in an error is the one an editor shows.

    Args:
        path: a UTF-8 file with one JSON object a line.

    Returns:
        The rows in the order of the file, read as they are asked for.

    Raises:
        UsageError: if there is no such file.
        TaskError: if the file cannot be read, or a line does not follow the row format; names file:line.
    """
    for where, record in iter_records(path, "task"):
        yield parse_row(record, where)


def iter_records(path: str | Path, kind: str) -> Iterator[tuple[str, object]]:
    """Stream the JSON values of a JSONL file, as `iter_rows` does, whatever their fields.

    Args:
        path: as for `iter_rows`.
        kind: what the file is, for errors.

    Returns:
        The place (file:line) and the value of each line.

    Raises:
        UsageError: if there is no such file.
        TaskError: if the file cannot be read, or a line is no JSON.
    """
    with _open(path, kind) as file, reported(path, kind):
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
            if len(line) > MAX_LINE_BYTES:
                raise TaskError(
                    f"{path}:{number}: a line must have at most {MAX_LINE_BYTES:,} bytes", found="a longer one",
                    remedy="write one row a line, and long texts as several rows",
                )  # fmt: skip
            if number == 1:
                line = line.removeprefix(UTF8_BOM)
            if line.strip():
                where = f"{path}:{number}"
                yield where, decode_json(line, where)


def _open(path: str | Path, kind: str) -> BinaryIO:
    try:
        return open_regular(Path(path))
    except FileNotFoundError:
        raise UsageError(f"the {kind} file must exist", found=path, remedy="check the path") from None
    except OSError as error:
        raise _unreadable(path, kind, error) from error


@contextmanager
def reported(path: str | Path, kind: str) -> Iterator[None]:
    """What goes wrong while a file is read, as an error that names it."""
    try:
        yield
    except OSError as error:
        raise _unreadable(path, kind, error) from error


def _unreadable(path: str | Path, kind: str, error: OSError) -> TaskError:
    return TaskError(f"{path}: the {kind} file must be readable", found=error.strerror or str(error))


def _check_size(data: bytes, where: str) -> None:
    """Refuse a document whose values would take more than memory and patience hold, before it is parsed.

    Raises:
        TaskError: naming the place.
    """
    objects, keys = data.count(b"{"), data.count(b":")
    reckoned = OBJECT_BYTES * objects + KEY_BYTES * max(0, keys - FEW_KEYS * objects)
    reckoned += LIST_BYTES * data.count(b"[") + VALUE_BYTES * data.count(b",")
    most = max(MAX_VALUE_BYTES, BYTES_PER_BYTE * len(data))
    if reckoned > most:
        raise TaskError(
            f"{where}: the values of a document of {len(data):,} bytes must take at most {most:,} bytes of memory",
            found=f"{reckoned:,}, by its brackets, colons and commas",
            remedy="save the rows as JSONL, one object a line",
        )  # fmt: skip


def decode_json(data: bytes, where: str) -> object:
    """Decode JSON strictly: UTF-8, no key twice in one object, no NaN, Infinity or number beyond floats.

    Python's own decoder keeps the last of two equal keys and drops the other without a word.

    Raises:
        TaskError: naming the place, what is wrong and the remedy.
    """
    _check_size(data, where)
    try:
        return _DECODER.decode(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise TaskError(
            f"{where}: the text must be UTF-8",
            found=f"byte 0x{byte:02x} at position {error.start + 1}",
            remedy="save the file as UTF-8",
        ) from None
    except json.JSONDecodeError as error:
        raise TaskError(
            f"{where}: the text must be valid JSON",
            found=f"{error.msg} at column {error.colno} of {shorten(error.doc.strip())}",
            remedy="correct the line; one whole JSON object a line",
        ) from None
    except (ValueError, RecursionError) as error:
        raise TaskError(
            f"{where}: the text must be plain JSON", found=shorten(str(error)), remedy="correct the line"
        ) from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError(f"the key {shorten(first_twice(key for key, _ in pairs))} is given twice")
    return record


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text[:40]} is larger than a number can be")
    return value


def _whole(text: str) -> int:
    _finite(text)
    return int(text)


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_whole
)
