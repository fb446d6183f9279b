"""Files of strangers: regular, bounded, whole."""

import os
import socket
from pathlib import Path

import pytest

from lorary.reading import open_regular, parse_json, read_json, read_regular


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
