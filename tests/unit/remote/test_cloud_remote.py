"""Push, pull and clone over an S3 server on this machine."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from s3_server import s3_server

from lorary.adapter import Adapter
from lorary.errors import LibraryError, LoraryError
from lorary.library.store import Library
from lorary.remote.clone import clone_library
from lorary.remote.cloud import CloudStore
from lorary.remote.place import parse_place
from lorary.remote.pull import pull_library
from lorary.remote.push import push_library
from lorary.remote.store import AbsentError, StaleError, Traffic

MakeLibrary = Callable[..., Library]
MakeAdapter = Callable[..., Adapter]
SECRET = "secret-of-a-test"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture
def url(address: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-of-a-test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setattr("lorary.remote.store.FIRST_WAIT_S", 0.0)
    return f"s3://bucket/{request.node.name}"


def test_a_library_goes_and_comes_and_only_changes_move(
    url: str, make_library: MakeLibrary, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    library = make_library("lib", **{f"a{number}": float(number + 1) for number in range(8)})
    first = push_library(library.path, f"{url}@v1")
    assert clone_library(url, tmp_path / "copy").received == library.names()
    assert Library.open(tmp_path / "copy").verify() == []
    library.replace_adapter(make_adapter("a3", 20.0), {"tasks": ["a3"]})
    second = push_library(library.path, url)
    assert second.sent == ["a3"]
    # The ref, a page and the index are read; three files are asked for, of which two are new; page, index and ref go.
    assert second.requests < 16
    assert second.bytes_sent < first.bytes_sent / 2
    pulled = pull_library(tmp_path / "copy")
    assert (pulled.received, pulled.bytes_sent) == (["a3"], 0)
    assert clone_library(f"{url}@v1", tmp_path / "old").received == library.names()
    assert Library.open(tmp_path / "old").provenance("a3") != library.provenance("a3")


def test_pushes_at_once_lose_nothing(url: str, make_library: MakeLibrary, tmp_path: Path) -> None:
    libraries = [make_library(f"lib{number}", **{f"x{number}": 1.0}) for number in range(3)]
    start, errors = threading.Barrier(len(libraries)), list[LoraryError]()

    def push(library: Library) -> None:
        start.wait()
        try:
            push_library(library.path, url)
        except LoraryError as error:
            errors.append(error)

    threads = [threading.Thread(target=push, args=(library,)) for library in libraries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert clone_library(url, tmp_path / "copy").received == ["x0", "x1", "x2"]


def test_a_store_creates_once_and_replaces_what_was_read(url: str) -> None:
    traffic = Traffic()
    store = CloudStore(parse_place(url), traffic)
    assert store.create("refs/main", b"1")
    assert not store.create("refs/main", b"2")
    fetched = store.get("refs/main")
    store.replace("refs/main", b"345", fetched.etag)
    with pytest.raises(StaleError):
        store.replace("refs/main", b"4", fetched.etag)
    assert (store.get("refs/main").data, store.read("refs/main", 1, 2)) == (b"345", b"45")
    assert (store.size("refs/main"), store.size("refs/none")) == (3, None)
    assert store.list("refs/") == {"refs/main": 3}
    with pytest.raises(AbsentError):
        store.get("refs/none")
    assert (traffic.requests > 5, traffic.sent) == (True, 4)


def test_a_bucket_that_is_not_there_is_said_without_secrets(
    url: str, make_library: MakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = make_library("lib", a=1.0)
    with pytest.raises(LibraryError, match="NoSuchBucket") as error:
        push_library(library.path, "s3://no-bucket/lib")
    assert SECRET not in str(error.value)
    monkeypatch.setattr("lorary.remote.store.ATTEMPTS", 2)
    monkeypatch.setattr("lorary.remote.cloud.RETRIES", {"max_retries": 0})
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(LibraryError, match="in each of 2 attempts") as error:
        push_library(library.path, url)
    assert SECRET not in str(error.value)
