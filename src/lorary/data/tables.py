"""Rows out of one file of a data set, as they stand in it: no text becomes a number, a date or nothing.

CSV and TSV hold texts and nothing else. JSON and JSONL hold what they hold. Parquet and Arrow have types of their own.
Nothing is cached, so that a file that changed is read as it is.
"""

import csv
import errno
import io
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lorary.data.jsonl import MAX_LINE_BYTES, decode_json, iter_records
from lorary.data.schema import FIELDS, REQUIRED_FIELDS, shorten
from lorary.errors import TaskError
from lorary.reading import first_twice, open_regular

# Larger than a data set in one JSON document should be; JSONL is streamed, and may be of any size.
MAX_JSON_BYTES = 256 * 1024 * 1024
CHUNK_BYTES = 1024 * 1024
# Rows of a Parquet or Arrow file that are turned into Python's values at once.
BATCH_ROWS = 1024
# Rows that such a file may hold. Equal ones take no room in it, so that its size bounds nothing.
MAX_ROWS = 10_000_000

# A row: its columns by name.
TableRow = Mapping[str, Any]
# Fields of a row that need not be given: an empty cell does not give them.
OPTIONAL = FIELDS - {*REQUIRED_FIELDS}


def read_table(path: Path, delimiter: str | None = None) -> Iterator[TableRow]:
    """The rows of a file, by its ending; one whose ending is not in `READERS` is read as JSONL.

    Args:
        path: the file.
        delimiter: between the cells of a CSV file, where it is not the usual one.

    Raises:
        TaskError: if the file cannot be read, or is not what its ending says; names it and the place.
    """
    try:
        if delimiter is not None and path.suffix.lower() in DELIMITERS:
            yield from _read_cells(path, delimiter)
        else:
            yield from READERS.get(path.suffix.lower(), _read_lines)(path)
    except OSError as error:
        raise TaskError(f"{path}: the data file must be readable", found=error.strerror or str(error)) from error


def _read_cells(path: Path, delimiter: str) -> Iterator[TableRow]:
    # One text may be longer than the package's own bound; it is ours that holds.
    csv.field_size_limit(MAX_LINE_BYTES)
    with open_regular(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(_bounded_lines(text, path), delimiter=delimiter, strict=True)
        try:
            head = next(reader, [])
            if len(set(head)) < len(head):
                raise TaskError(
                    f"{path}: a column must have a name of its own", found=f"{shorten(first_twice(head))}, twice"
                )
            for cells in reader:
                if not cells:  # a blank line
                    continue
                where = f"{path}:{reader.line_num}"
                if len(cells) != len(head):
                    raise TaskError(
                        f"{where}: a row must have a cell for each of the {len(head)} columns",
                        found=f"{len(cells)} cells",
                        remedy="put a text that holds the delimiter or a line break in double quotes",
                    )
                row = zip(head, cells, strict=True)
                yield {name: cell for name, cell in row if cell or name not in OPTIONAL}
        except UnicodeDecodeError as error:
            raise TaskError(
                f"{path}: the text must be UTF-8", found=f"byte 0x{error.object[error.start]:02x}",
                remedy="save the file as UTF-8",
            ) from None  # fmt: skip
        except csv.Error as error:
            raise TaskError(
                f"{path}:{reader.line_num}: the text must be cells, quoted as CSV quotes them", found=error,
                remedy="write a double quote inside a quoted cell twice",
            ) from None  # fmt: skip


def _bounded_lines(text: io.TextIOWrapper, path: Path) -> Iterator[str]:
    """The lines of a text, none of which takes the memory of the machine."""
    number = 0
    while line := text.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise TaskError(
                f"{path}:{number}: a line must have at most {MAX_LINE_BYTES:,} characters", found="a longer one",
                remedy="write long texts as several rows",
            )  # fmt: skip
        yield line


def _read_json(path: Path) -> Iterator[TableRow]:
    """A list of objects, an object of lists (the columns), or an object a line."""
    begin = _read_text(path)
    end = begin.find(b"\n")
    if begin.startswith(b"{") and begin[:end].rstrip().endswith(b"}") and end > 0 and not begin[end:].isspace():
        yield from _read_lines(path)
        return
    document = decode_json(begin, str(path))
    if isinstance(document, dict):
        document = _from_columns(document, path)
    if not isinstance(document, list):
        raise TaskError(f"{path}: a data set must be a list of objects", found=shorten(document))
    for number, row in enumerate(document):
        yield _object(row, f"{path}, row {number}")


def _read_text(path: Path) -> bytes:
    """The text of a file from its first sign on. Zero bytes, of which a file of holes consists, end it at once."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_JSON_BYTES:
            raise OSError(errno.EFBIG, f"it is larger than {MAX_JSON_BYTES:,} bytes", str(path))
        data = bytearray()
        while chunk := file.read(CHUNK_BYTES):
            data += chunk
            if b"\0" in chunk or len(data) > MAX_JSON_BYTES:
                raise TaskError(
                    f"{path}: a data set must be text", found="a zero byte", remedy="copy or download it again"
                )
    return bytes(data.removeprefix(b"\xef\xbb\xbf").lstrip())


def _from_columns(document: Mapping[str, Any], path: Path) -> list[Any]:
    """The rows of an object whose values are the columns; an object that is one row is that row."""
    if not all(isinstance(column, list) for column in document.values()):
        return [document]
    if len({len(column) for column in document.values()}) > 1:
        lengths = ", ".join(f"{name} {len(column)}" for name, column in document.items())
        raise TaskError(f"{path}: all columns must be of one length", found=lengths[:200])
    return [dict(zip(document, row, strict=True)) for row in zip(*document.values(), strict=True)]


def _read_lines(path: Path) -> Iterator[TableRow]:
    for where, row in iter_records(path, "data"):
        yield _object(row, where)


def _object(row: object, where: str) -> TableRow:
    if not isinstance(row, dict):
        raise TaskError(f"{where}: a row must be a JSON object", found=shorten(row))
    return row


def _read_parquet(path: Path) -> Iterator[TableRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_regular(path) as file:
        try:
            table = pq.ParquetFile(file)
            _check_rows(table.metadata.num_rows, path)
            yield from _rows(table.iter_batches(BATCH_ROWS), path)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, "a Parquet file", error) from error


def _read_arrow(path: Path) -> Iterator[TableRow]:
    import pyarrow as pa

    with open_regular(path) as file:
        try:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            if is_file:
                reader = pa.ipc.open_file(file)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                batches = iter(pa.ipc.open_stream(file))
            yield from _rows(batches, path)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, "an Arrow file", error) from error


def _rows(batches: Iterator[Any], path: Path) -> Iterator[TableRow]:
    number = 0
    for batch in batches:
        number += batch.num_rows
        _check_rows(number, path)
        # Arrow believes the lengths and offsets of a file: they must be inside of it, and texts be text.
        batch.validate(full=True)
        yield from batch.to_pylist()


def _check_rows(number: int, path: Path) -> None:
    if number > MAX_ROWS:
        raise TaskError(
            f"{path}: a data file must hold at most {MAX_ROWS:,} rows", found=f"{number:,}",
            remedy="keep the rows that are needed",
        )  # fmt: skip


def _unreadable(path: Path, kind: str, error: Exception) -> TaskError:
    finding = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return TaskError(f"{path} must be {kind} that can be read", found=finding, remedy="copy or download it again")


DELIMITERS = {".csv": ",", ".tsv": "\t"}
READERS: Mapping[str, Callable[[Path], Iterator[TableRow]]] = {
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".csv": lambda path: _read_cells(path, DELIMITERS[".csv"]),
    ".tsv": lambda path: _read_cells(path, DELIMITERS[".tsv"]),
    ".jsonl": _read_lines,
    ".json": _read_json,
}
