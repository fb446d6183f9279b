"""Reading files that somebody else wrote: regular files only, of a bounded size, JSON and weights of a bounded kind.

A FIFO would block for ever, a device would never end, and a document of a gigabyte would take the memory of the
machine. Everything here raises `OSError` or `ValueError`, which the caller turns into an error of its own room that
names the file.
"""

import errno
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from io import BufferedReader, BytesIO
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

# Larger than any configuration, index, manifest or tokenizer description that a model or a library has.
MAX_DOCUMENT_BYTES = 64 * 1024 * 1024
# Bytes that are read at a time of a file that is longer than it said.
MAX_PART_BYTES = 1024 * 1024
# Memory that a document may take while it is parsed, as far as its length and its signs tell. Ten thousand adapters in
# one index take a fifth.
MAX_PARSED_BYTES = 96 * 1024 * 1024
# What an object, a list, a key and a value take at most, beside their text.
_OBJECT_BYTES, _LIST_BYTES, _KEY_BYTES, _VALUE_BYTES = 200, 72, 180, 64
# Tensors of one file, and bytes of its header: adapters of each expert of the largest models have as many.
MAX_TENSORS = 100_000
MAX_HEADER_BYTES = 16 * 1024 * 1024
# Axes of a tensor: torch has no more.
MAX_AXES = 64
# Bits of one number by the names that safetensors has.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F4": 4,
    "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64,
    "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip


def open_regular(path: Path, *, follow_links: bool = True, folder: int | None = None) -> BufferedReader:
    """Open a regular file for reading; a FIFO, socket or device is refused without waiting for it.

    Args:
        path: the file.
        follow_links: whether the last part of the path may be a symbolic link.
        folder: descriptor of an open folder, in which the last part of the path is looked up; the path then only
            names the file in errors.

    Raises:
        OSError: if it cannot be opened, is no regular file, or is a link and links are not followed.
    """
    return os.fdopen(_opened(path, follow_links, folder)[0], "rb")


def _opened(path: Path, follow_links: bool, folder: int | None) -> tuple[int, int]:
    """A descriptor of a regular file, and its size in bytes; arguments and errors as for `open_regular`."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path if folder is None else path.name, flags, dir_fd=folder)
    except OSError as error:
        error.filename = str(path)
        if error.errno == errno.ELOOP and not follow_links:
            raise OSError(errno.ELOOP, "it is a symbolic link", str(path)) from error
        if error.errno == errno.ENXIO:  # what opening a socket says
            raise _not_regular(path) from error
        raise
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise _not_regular(path)
        return descriptor, status.st_size
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(
    path: Path,
    *,
    max_bytes: int | None = MAX_DOCUMENT_BYTES,
    follow_links: bool = True,
    folder: int | None = None,
) -> bytes:
    """The bytes of a regular file.

    Args:
        path: the file.
        max_bytes: refuse a larger file before reading it; None for what may be of any size.
        follow_links: whether the last part of the path may be a symbolic link.
        folder: as for `open_regular`.

    Raises:
        OSError: as for `open_regular`, or if the file is larger than `max_bytes`.
    """
    if max_bytes is None:
        with open_regular(path, follow_links=follow_links, folder=folder) as file:
            return file.read()
    descriptor, size = _opened(path, follow_links, folder)
    try:
        # Without a buffer of its own, and with room for no more than there is: both take longer than a small file does.
        is_larger = size > max_bytes  # nothing of such a file is read
        data = part = b"" if is_larger else os.read(descriptor, size + 1)
        while part and len(data) <= max_bytes:
            data += (part := os.read(descriptor, min(MAX_PART_BYTES, max_bytes + 1 - len(data))))
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(descriptor)
    if is_larger or len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {max_bytes:,} bytes", str(path))
    return data


def parse_json(data: bytes, *, max_bytes: int = MAX_PARSED_BYTES) -> Any:
    """The value in a JSON document in UTF-8, with or without a byte order mark.

    Args:
        data: the document.
        max_bytes: memory that it may take while it is parsed, about.

    Raises:
        ValueError: if it is no JSON, would take too much memory, is nested too deeply, gives a key twice, or holds half
            a character (a lone surrogate, which no file and no terminal can take).
    """
    signs = data.count(b"{") * _OBJECT_BYTES + data.count(b"[") * _LIST_BYTES
    signs += data.count(b":") * _KEY_BYTES + data.count(b",") * _VALUE_BYTES
    # One character beyond the first 65,536 makes four bytes of each.
    _check_memory(signs + len(data) * (2 if data.isascii() else 5), max_bytes)
    text = data.decode("utf-8-sig")
    _check_memory(signs + len(data) + 2 * sys.getsizeof(text), max_bytes)
    try:
        value = _DECODER.decode(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if b"\\ud" in data or b"\\uD" in data:
        for string in _strings(value):
            try:
                string.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(f"it holds half a character, \\u{ord(error.object[error.start]):04x}") from error
    return value


def _check_memory(estimate: int, max_bytes: int) -> None:
    if estimate > max_bytes:
        raise ValueError(f"it would take {estimate:,} bytes of memory, more than {max_bytes:,}")


def _strings(value: Any) -> Iterator[str]:
    """All texts of a document, keys too."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from value
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def read_json(path: Path, *, follow_links: bool = True, max_bytes: int = MAX_PARSED_BYTES) -> Any:
    """The value in a JSON file; arguments and errors as for `read_regular` and `parse_json`."""
    return parse_json(read_regular(path, follow_links=follow_links), max_bytes=max_bytes)


Name = TypeVar("Name")


class TensorEntry(NamedTuple):
    """What the header of a safetensors file says of one tensor.

    Args:
        dtype: as the format names it.
        shape: of the tensor.
        begin: of its bytes, behind the header.
        end: of its bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_weights(file: BufferedReader) -> bytes:
    """The bytes of a safetensors file; one larger than a document is refused unread if it is not what its header says.

    Whether a smaller one is whole is for the caller to check, who may know its hash.

    Args:
        file: from `open_regular`, at its beginning.

    Raises:
        OSError: if it cannot be read.
        ValueError: as for `read_header`, of a large file.
    """
    size = os.fstat(file.fileno()).st_size
    if size > MAX_DOCUMENT_BYTES:
        read_header(file, size)
        file.seek(0)
    return file.read(size)


def parse_header(data: bytes) -> dict[str, TensorEntry]:
    """The header of a safetensors file that is in memory; errors as for `read_header`."""
    return read_header(BytesIO(data), len(data))


def read_header(file: BufferedReader | BytesIO, size: int) -> dict[str, TensorEntry]:
    """The header of a safetensors file, held to the format: each byte behind it belongs to exactly one tensor.

    The reader of safetensors itself lets the last one win of two tensors of a name, and takes a header of any size.

    Args:
        file: at its beginning.
        size: of the file, in bytes.

    Returns:
        By name, in the order of the header, without its metadata.

    Raises:
        ValueError: if the header is larger than any file has, is cut off or no such JSON, names a tensor twice, or
            does not say of each byte whose it is.
    """
    length = int.from_bytes(start := file.read(8), "little")
    if len(start) < 8 or length > size - 8:
        raise ValueError(f"it ends in its header: {size:,} bytes, {length + 8:,} for the header alone")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header has {length:,} bytes, more than {MAX_HEADER_BYTES:,}")
    text = file.read(length)
    counts = {sign: text.count(sign) for sign in (b"{", b"[", b",")}
    if counts[b"{"] > MAX_TENSORS + 2 or counts[b"["] > 2 * MAX_TENSORS or counts[b","] > 8 * MAX_TENSORS:
        raise ValueError(f"its header has more than {MAX_TENSORS:,} tensors, or more values than these have")
    try:
        pairs = json.loads(text.decode(), object_pairs_hook=_header_part)
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    is_object = text.startswith(b"{") and _is_pairs(pairs)
    entries = _unique([(name, entry) for name, entry in pairs if name != "__metadata__"]) if is_object else {}
    if not is_object or not all(isinstance(entry, TensorEntry) for entry in entries.values()):
        raise ValueError("its header must be an object that gives dtype, shape and data_offsets of each tensor")
    for metadata in (entry for name, entry in pairs if name == "__metadata__" and _is_pairs(entry)):
        _unique(metadata)
    if len(pairs) - len(entries) > 1:
        raise ValueError("its header gives __metadata__ twice")
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end or 8 * (entry.end - entry.begin) != prod(entry.shape) * _BITS[entry.dtype]:
            raise ValueError(
                f"the tensor {name[:200]!r} of {entry.dtype} {str(list(entry.shape))[:80]} must take its own bytes "
                f"from {end}, not {entry.begin} to {entry.end}"
            )
        end = entry.end
    if end != size - 8 - length:
        raise ValueError(f"its tensors take {end:,} bytes, and {size - 8 - length:,} stand behind its header")
    return entries


def _header_part(pairs: list[tuple[str, Any]]) -> Any:
    """An entry of a header, made as soon as it is read, so that a large header takes little; other objects as pairs."""
    fields = dict(pairs)
    if len(fields) != 3 or len(pairs) != 3 or fields.keys() != {"dtype", "shape", "data_offsets"}:
        return pairs
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    is_entry = (
        isinstance(dtype, str) and dtype in _BITS and _are_sizes(shape) and _are_sizes(offsets)
        and len(shape) <= MAX_AXES and len(offsets) == 2
    )  # fmt: skip
    return TensorEntry(sys.intern(dtype), tuple(shape), *offsets) if is_entry else pairs


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 2**63 for each in value)


def _is_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value)


def first_twice(names: Iterable[Name]) -> Name:
    """The first of some names that is one of those before it; there must be one."""
    met: set[Name] = set()
    return next(name for name in names if name in met or met.add(name))  # type: ignore[func-returns-value]


def _not_regular(path: Path) -> OSError:
    return OSError(errno.EINVAL, "it is not a regular file", str(path))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        twice = first_twice(name for name, _ in pairs)
        raise ValueError(f"the key {twice[:80]!r} stands in it twice")
    return document


# Made once: `json.loads` makes one for each document that has a hook, which takes as long as a small one.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
