"""A remote that is only read, by a file system of fsspec."""

from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from lorary.errors import LibraryError, UsageError
from lorary.library.store import Library
from lorary.remote.clone import clone_library
from lorary.remote.push import push_library

MakeLibrary = Callable[..., Library]


def test_a_library_is_cloned_from_it_and_not_pushed_to_it(make_library: MakeLibrary, tmp_path: Path) -> None:
    library, remote = make_library("lib", a=1.0), tmp_path / "remote"
    push_library(library.path, str(remote))
    memory = fsspec.filesystem("memory")
    for path in remote.rglob("*"):
        if path.is_file():
            memory.pipe(f"/some/remote/{path.relative_to(remote)}", path.read_bytes())
    assert clone_library("memory://some/remote", tmp_path / "copy").received == ["a"]
    assert Library.open(tmp_path / "copy").verify() == []
    with pytest.raises(LibraryError, match="none of that name"):
        clone_library("memory://some/remote@v9", tmp_path / "none")
    with pytest.raises(LibraryError, match="a place that is only read"):
        push_library(library.path, "memory://elsewhere")
    with pytest.raises(UsageError, match="a scheme that can be read"):
        clone_library("nonsense://some/remote", tmp_path / "none")


def test_a_place_that_connects_at_once_and_gets_no_answer_is_named(make_library: MakeLibrary, tmp_path: Path) -> None:
    library, nobody = make_library("lib", a=1.0), "ftp://127.0.0.1:9/lib"
    with pytest.raises(LibraryError, match=f"{nobody} must answer\nfound: ConnectionRefusedError"):
        clone_library(nobody, tmp_path / "copy")
    with pytest.raises(LibraryError, match="a place that is only read"):
        push_library(library.path, nobody)
