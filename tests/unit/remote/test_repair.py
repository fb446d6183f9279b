"""Repair mends what verify finds, keeps what was there, and says what it cannot mend."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lorary.adapter import Adapter
from lorary.errors import LibraryError
from lorary.library.derived import save_derived
from lorary.library.store import Library
from lorary.remote.push import push_library
from lorary.remote.repair import repair_library

MakeLibrary = Callable[..., Library]
MakeAdapter = Callable[..., Adapter]


def flip(path: Path) -> None:
    """Damage a file as a disk does; a snapshot's link of it stays whole, as in a copy."""
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.unlink()
    path.write_bytes(data)


@pytest.fixture
def library(make_library: MakeLibrary) -> Library:
    return make_library("lib", a=1.0, b=2.0)


def test_a_damaged_adapter_comes_back_from_a_snapshot_and_the_damaged_one_is_kept(library: Library) -> None:
    library.snapshot("s")
    weights = library.path / "adapters" / "a" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    flip(weights)
    damaged = weights.read_bytes()
    told = repair_library(library.path, check=True)
    assert weights.read_bytes() == damaged
    assert [(step.part, step.action, step.is_mended) for step in told.steps] == [
        ("a", "restored from snapshot 's'", True)
    ]
    assert told.problems
    assert told.aside is None
    done = repair_library(library.path)
    assert (done.steps, done.problems) == (told.steps, [])
    assert weights.read_bytes() == whole
    assert done.aside is not None
    assert (Path(done.aside) / "adapters" / "a" / weights.name).read_bytes() == damaged
    again = repair_library(library.path)
    assert (again.steps, again.aside) == ([], None)


@pytest.mark.parametrize("is_remote", [True, False])
def test_a_remote_or_another_library_has_what_is_missing(
    library: Library, make_library: MakeLibrary, tmp_path: Path, is_remote: bool
) -> None:
    if is_remote:
        source = str(tmp_path / "remote")
        push_library(library.path, source)
    else:
        source = str(make_library("other", a=1.0, b=5.0).path)
    for name in ("a", "b"):
        (library.path / "adapters" / name / "adapter_model.safetensors").unlink()
    done = repair_library(library.path, source)
    assert library["a"].rank == 2
    if is_remote:
        assert done.problems == []
    else:  # b is another one there
        assert [step.is_mended for step in done.steps] == [True, False]
        assert {problem.adapter for problem in done.problems} == {"b"}
    assert library.verify() == done.problems


def test_what_has_no_record_is_recorded_anew_or_restored(library: Library) -> None:
    for name in ("a", "b"):
        (library.path / "adapters" / name / "provenance.json").unlink()
    done = repair_library(library.path)
    assert done.problems == []
    assert all("recorded anew" in step.action for step in done.steps)
    assert library.provenance("a")["tasks"] == []


def test_what_does_not_belong_there_is_put_aside(library: Library, tmp_path: Path) -> None:
    adapters = library.path / "adapters"
    (adapters / "notes.txt").write_text("precious")
    (adapters / ".hidden").mkdir()
    (adapters / "a" / "README.md").write_text("of a")
    (adapters / "a" / "more").mkdir()
    (adapters / "a" / "more" / "file").write_text("deep")
    (tmp_path / "outside").mkdir()
    os.rename(adapters / "b", tmp_path / "outside" / "b")
    (adapters / "b").symlink_to(tmp_path / "outside" / "b")
    told = repair_library(library.path, check=True)
    assert (adapters / "notes.txt").exists()
    done = repair_library(library.path)
    assert done.steps == told.steps
    aside = Path(done.aside or "") / "adapters"
    assert (aside / "notes.txt").read_text() == "precious"
    assert (aside / ".hidden").is_dir()
    assert (aside / "a" / "README.md").read_text() == "of a"
    assert (aside / "a" / "more" / "file").read_text() == "deep"
    assert (library.path / "adapters" / "b").is_symlink()  # nothing at hand has b: it is said, and left
    assert [problem.adapter for problem in done.problems] == ["b"]
    other = repair_library(library.path, None)
    assert [step.is_mended for step in other.steps] == [False]


def test_a_link_in_the_place_of_an_adapter_gives_way_to_a_whole_one(library: Library, tmp_path: Path) -> None:
    library.snapshot("s")
    os.rename(library.path / "adapters" / "b", tmp_path / "b")
    (library.path / "adapters" / "b").symlink_to(tmp_path / "b")
    done = repair_library(library.path)
    assert done.problems == []
    assert (Path(done.aside or "") / "adapters" / "b" / "b").is_symlink()
    assert (tmp_path / "b" / "provenance.json").exists()


def test_damaged_derived_data_are_found_and_put_aside(library: Library) -> None:
    folder = save_derived(library.path, "other", {"seed": 1}, {"a.json": b"{}"})
    (folder / "a.json").write_bytes(b"[]")
    assert [problem.adapter for problem in library.verify()] == [f"derived/{folder.name}"]
    assert repair_library(library.path).problems == []
    assert not folder.exists()


def test_a_damaged_library_json_comes_back(library: Library, make_library: MakeLibrary) -> None:
    document = library.path / "library.json"
    whole = document.read_bytes()
    document.write_text("{")
    with pytest.raises(LibraryError, match="must hold one JSON object"):
        repair_library(library.path)
    source = str(make_library("other").path)
    assert repair_library(library.path, source, check=True).problems
    assert document.read_text() == "{"
    done = repair_library(library.path, source)
    assert json.loads(document.read_bytes())["base"] == json.loads(whole)["base"]
    assert [step.part for step in done.steps] == ["library.json"]
    assert done.problems == []
    assert (library.path / "aside" / "1" / "library.json").read_text() == "{"


def test_a_source_that_is_damaged_itself_gives_nothing(library: Library, make_adapter: MakeAdapter) -> None:
    library.snapshot("s")
    weights = library.path / "adapters" / "a" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    with open(weights, "r+b") as file:  # in place: the snapshot's link has the same bytes
        file.write(data)
    done = repair_library(library.path)
    assert [step.is_mended for step in done.steps] == [False]
    assert weights.read_bytes() == bytes(data)
    assert done.problems
