"""A library that a command makes goes again where nothing came of it, but never one that another build is using."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from lorary.errors import LibraryError
from lorary.library import opening
from lorary.library.opening import created_for, open_or_create
from lorary.library.store import Library


def test_a_library_made_for_nothing_goes_again(tmp_path: Path, tiny_base_folder: Path) -> None:
    path = tmp_path / "lib"
    with pytest.raises(RuntimeError), created_for(str(path), str(tiny_base_folder)):
        raise RuntimeError
    assert not path.exists()


def test_of_two_first_builds_the_refused_one_leaves_the_library_of_the_other(
    tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, base = tmp_path / "lib", str(tiny_base_folder)
    vacant = opening.is_vacant

    def made_meanwhile(folder: Path) -> bool:
        was_vacant = vacant(folder)
        Library.create(folder, base)
        return was_vacant

    monkeypatch.setattr(opening, "is_vacant", made_meanwhile)
    with pytest.raises(RuntimeError), created_for(str(path), base):
        raise RuntimeError
    assert Library.open(path).names() == []


def test_a_library_that_another_build_has_begun_on_stays(tmp_path: Path, tiny_base_folder: Path) -> None:
    path = tmp_path / "lib"
    with ExitStack() as other:

        def refused() -> None:
            with created_for(str(path), str(tiny_base_folder)):
                other.enter_context(Library.open(path).build_lock())
                raise RuntimeError

        with pytest.raises(RuntimeError):
            refused()
        assert Library.open(path).names() == []


def test_a_folder_with_the_traces_of_a_creation_that_was_killed_becomes_a_library(
    tmp_path: Path, tiny_base_folder: Path
) -> None:
    for trace in (".write.lock", "library.json.new"):
        path = tmp_path / trace.strip(".")
        path.mkdir()
        (path / trace).touch()
        assert open_or_create(str(path), str(tiny_base_folder)).names() == []
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").touch()
    with pytest.raises(LibraryError, match=r"no library\.json"):
        open_or_create(str(other), str(tiny_base_folder))
