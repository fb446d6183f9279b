"""Files of strangers: regular, bounded, whole."""

import json
import os
import socket
import time
import tracemalloc
from pathlib import Path

import pytest

from lorary.reading import (
    MAX_HEADER_BYTES,
    TensorEntry,
    open_regular,
    parse_header,
    parse_json,
    read_json,
    read_regular,
    read_weights,
)


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert read_regular(tmp_path / "file", max_bytes=3) == b"abc"
    assert read_regular(tmp_path / "file", max_bytes=None) == b"abc"


def test_a_larger_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abcd")
    with pytest.raises(OSError, match="larger than 3 bytes"):
        read_regular(tmp_path / "file", max_bytes=3)


@pytest.mark.parametrize("kind", ["fifo", "device", "socket"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(path))
        listening.close()
    with pytest.raises(OSError, match="not a regular file"):
        read_regular(path)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path)


def test_a_link_is_followed_where_it_may_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link") == b"abc"
    with pytest.raises(OSError, match="symbolic link"):
        open_regular(tmp_path / "link", follow_links=False)


def test_a_refused_file_leaves_no_descriptor_open(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for _ in range(3):
        with pytest.raises(OSError, match="regular"):
            read_regular(tmp_path / "x")
    assert before == (len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": 1, "a": 2}', "'a' stands in it twice"),
        (b'"\\ud800"', "half a character"),
        (b'{"\\uDfff": 1}', "half a character"),
        (b"\xff\xfe", "utf-8"),
        (b"1" * 5000, "4300"),
        (b"{", "Expecting"),
    ],
)
def test_documents_that_are_refused(data: bytes, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        parse_json(data)


@pytest.mark.parametrize(("data", "value"), [(b'\xef\xbb\xbf{"a": 1}', {"a": 1}), (b'"\\ud83d\\ude00"', "\U0001f600")])
def test_documents_that_are_taken(tmp_path: Path, data: bytes, value: object) -> None:
    (tmp_path / "file.json").write_bytes(data)
    assert read_json(tmp_path / "file.json") == value


def test_a_file_that_is_longer_than_it_says_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 5)
    whole = os.fstat

    def smaller(descriptor: int) -> os.stat_result:
        fields = list(whole(descriptor))
        fields[6] = 100
        return os.stat_result(fields)

    monkeypatch.setattr("lorary.reading.os.fstat", smaller)
    monkeypatch.setattr("lorary.reading.MAX_PART_BYTES", 500)
    assert read_regular(tmp_path / "file") == bytes(range(256)) * 5
    with pytest.raises(OSError, match="larger than 1,279 bytes"):
        read_regular(tmp_path / "file", max_bytes=1279)
    assert len(read_regular(tmp_path / "file", max_bytes=1280)) == 1280


def header_of(**tensors: object) -> bytes:
    return json.dumps(tensors).encode()


def file_of(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def tensor(begin: object, end: object, shape: object = (2,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_the_header_of_a_whole_file_is_read() -> None:
    header = header_of(
        __metadata__={"format": "pt"}, b=tensor(8, 12, [1, 2], "BF16"), a=tensor(0, 8), c=tensor(12, 12, [0])
    )
    entries = parse_header(file_of(header + b"   ", bytes(12)))
    assert list(entries) == ["b", "a", "c"]
    assert entries["b"] == TensorEntry("BF16", (1, 2), 8, 12)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "ends in its header"),
        (bytes(7), "ends in its header"),
        ((2**63).to_bytes(8, "little") + b"{}", "ends in its header"),
        (file_of(header_of(a=tensor(0, 8), b=tensor(4, 12)), bytes(12)), "'b' .* its own bytes from 8, not 4 to 12"),
        (file_of(header_of(a=tensor(0, 8), b=tensor(0, 8)), bytes(8)), "its own bytes from 8"),
        (file_of(header_of(a=tensor(4, 12)), bytes(12)), "its own bytes from 0, not 4 to 12"),
        (file_of(header_of(a=tensor(0, 12)), bytes(12)), "of F32"),
        (file_of(header_of(a=tensor(0, 8, [2**62, 2**62])), bytes(8)), "its own bytes"),
        (file_of(header_of(a=tensor(0, 8)), bytes(7)), "take 8 bytes, and 7 stand behind"),
        (file_of(header_of(a=tensor(0, 8)), bytes(9)), "take 8 bytes, and 9 stand behind"),
        (file_of(header_of(a=tensor(8, 0)), bytes(8)), "its own bytes"),
        (file_of(header_of(a=tensor(-8, 0)), bytes(8)), "must be an object that gives"),
        (file_of(header_of(a=tensor(0, 8.0)), bytes(8)), "must be an object that gives"),
        (file_of(header_of(a=tensor(False, 8)), bytes(8)), "must be an object that gives"),
        (file_of(header_of(a=tensor(0, 8, [1] * 65)), bytes(8)), "must be an object that gives"),
        (file_of(header_of(a=tensor(0, 8, [-2])), bytes(8)), "must be an object that gives"),
        (file_of(header_of(a=tensor(0, 8, dtype="F33")), bytes(8)), "must be an object that gives"),
        (file_of(header_of(a=None), b""), "must be an object that gives"),
        (file_of(b"[]", b""), "must be an object that gives"),
        (file_of(b"3", b""), "must be an object that gives"),
        (file_of(b"[" * 100_000, b""), "nested too deeply"),
        (file_of(header_of(a=tensor(0, 8)).replace(b"}}", b'},"a":{}}'), bytes(8)), "stands in it twice"),
        (file_of(header_of(a=tensor(0, 8), b=tensor(0, 8)).replace(b'"b"', b'"a"'), bytes(8)), "'a' stands in it"),
        (file_of(b'{"__metadata__": {}, "__metadata__": {}}', b""), "__metadata__ twice"),
        (file_of(b'{"__metadata__": {"a": "1", "a": "2"}}', b""), "'a' stands in it twice"),
    ],
)  # fmt: skip
def test_headers_that_lie_are_refused(data: bytes, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        parse_header(data)


def test_a_header_of_more_than_any_file_has_is_refused_unread() -> None:
    data = file_of(b" " * (MAX_HEADER_BYTES + 1), b"")
    with pytest.raises(ValueError, match="its header has 16,777,217 bytes, more than"):
        parse_header(data)
    many = b"{" + b",".join(b'"%d":{}' % n for n in range(100_002)) + b"}"
    with pytest.raises(ValueError, match="more than 100,000 tensors"):
        parse_header(file_of(many, b""))
    with pytest.raises(ValueError, match="more than 100,000 tensors"):
        parse_header(file_of(b"[" + b"[]," * 200_001 + b"0]", b""))


def test_weights_that_are_larger_than_they_say_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(file_of(header_of(a=tensor(0, 8)), bytes(8)))
    with open_regular(path) as file:
        assert read_weights(file) == path.read_bytes()
    os.truncate(path, 2**40)  # holes, which take no room
    with open_regular(path) as file, pytest.raises(ValueError, match="take 8 bytes, and 1,099,511"):
        read_weights(file)
    with pytest.raises(OSError, match="larger than"):
        read_regular(path)


@pytest.mark.parametrize(
    "piece", [b"0", b"[]", b"{}", b'{"a":1}', b'"ab"', b'{"a":[[]]}', b"1.5", b"123456", '["é","\U0001f600"]'.encode()]
)
def test_a_document_takes_no_more_memory_than_was_reckoned(piece: bytes) -> None:
    data = b"[" + b",".join([piece] * 20_000) + b"]"
    tracemalloc.start()
    try:
        assert len(parse_json(data)) == 20_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    with pytest.raises(ValueError, match="bytes of memory, more than"):
        parse_json(data, max_bytes=peak)


def test_documents_of_too_much_memory_are_refused_before_they_are_parsed() -> None:
    for data in (b"[" + b"[]," * 1_000_000 + b"0]", b" " * 60_000_000, ("é" * 20_000_000).encode()):
        start = time.thread_time()
        with pytest.raises(ValueError, match="bytes of memory, more than 100,663,296"):
            parse_json(data)
        assert time.thread_time() - start < 5


def test_a_key_that_stands_twice_among_many_is_found_at_once() -> None:
    keys = b",".join(b'"%d":0' % n for n in range(100_000))
    start = time.thread_time()
    with pytest.raises(ValueError, match="'99999' stands in it twice"):
        parse_json(b"{" + keys + b',"99999":0}')
    assert time.thread_time() - start < 10  # it took minutes


def test_half_a_character_is_found_wherever_it_stands() -> None:
    for text in (r'{"a": ["\ud800"]}', r'{"a": {"\udc00": 1}}', r'["\ud83d\ude00", "\ud83d"]'):
        with pytest.raises(ValueError, match="half a character"):
            parse_json(text.encode())
    assert parse_json(rb'["\\ud800"]') == [r"\ud800"]
