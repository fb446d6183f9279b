"""Snapshots of a library: cheap, named, gone back to at one moment, and kept until they are removed."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lorary.adapter import Adapter
from lorary.errors import LibraryError, UsageError
from lorary.library.prepared import Prepared, expert_key, load_prepared, save_prepared
from lorary.library.store import Library
from lorary.remote.folder import FolderStore
from lorary.remote.snapshots import remove_snapshots
from lorary.remote.store import Traffic

MakeLibrary = Callable[..., Library]
MakeAdapter = Callable[..., Adapter]


def state(library: Library) -> dict[str, str]:
    assert library.verify() == []
    return {row["name"]: row["hash"] for row in library.describe()}


def test_a_library_goes_back_to_a_snapshot_and_forth_again(
    make_library: MakeLibrary, make_adapter: MakeAdapter
) -> None:
    library = make_library("lib", a=1.0, b=2.0, c=3.0)
    router, then = library.default_router, state(library)
    made = library.snapshot("then")
    assert (made.name, made.adapters) == ("then", ["a", "b", "c"])
    library.remove("a")
    library.replace_adapter(make_adapter("b", 9.0), {})
    library.add_adapter(make_adapter("d", 4.0), {})
    library.set_default_router({**router, "top_k": 1})
    now = state(library)
    back = library.rollback("then")
    assert (back.restored, back.removed) == (["a", "b"], ["d"])
    assert state(library) == then
    assert library.default_router == Library.open(library.path).default_router == router
    assert back.before is not None
    library.rollback(back.before)
    assert state(library) == now
    assert library.default_router["top_k"] == 1
    assert [each.name for each in library.snapshots()][:2] == ["then", back.before]
    assert library.rollback(back.before).before is None


def test_a_snapshot_costs_an_index_and_holds_what_is_removed(make_library: MakeLibrary) -> None:
    library = make_library("lib", **{f"a{number}": float(number) for number in range(5)})
    before = {os.stat(path).st_ino for path in (library.path / "adapters").rglob("*.safetensors")}
    library.snapshot()
    objects = list((library.path / ".snapshots" / "objects").iterdir())
    assert before <= {path.stat().st_ino for path in objects}
    assert len([path for path in objects if path.stat().st_nlink == 1]) == 3  # library.json, an index and its page
    second = library.snapshot()
    assert second.name == "2"
    assert len(list((library.path / ".snapshots" / "objects").iterdir())) == len(objects)
    for name in library.names():
        library.remove(name)
    assert library.rollback("1").restored == [f"a{number}" for number in range(5)]
    assert library.verify() == []


def test_prepared_data_come_back(make_library: MakeLibrary) -> None:
    import shutil

    import torch

    library = make_library("lib", a=1.0)
    key = expert_key(library, "a")
    save_prepared(library, "centroid", key, Prepared({"layer": torch.ones(2)}, {"rows": 1}, {}))
    library.snapshot("s")
    shutil.rmtree(library.path / "derived")
    library.rollback("s")
    assert load_prepared(library, "centroid", key) is not None


def test_only_what_no_snapshot_needs_is_collected(make_library: MakeLibrary, make_adapter: MakeAdapter) -> None:
    library = make_library("lib", a=1.0)
    library.snapshot("one")
    library.replace_adapter(make_adapter("a", 2.0), {})
    library.snapshot("two")
    objects = library.path / ".snapshots" / "objects"
    number = len(list(objects.iterdir()))
    (objects / ("0" * 64)).write_bytes(b"of a snapshot that was killed")
    assert remove_snapshots(library) == 29
    assert len(list(objects.iterdir())) == number
    assert remove_snapshots(library, ["one"]) > 0
    assert [each.name for each in library.snapshots()] == ["two"]
    library.remove("a")
    library.rollback("two")
    assert library.verify() == []
    with pytest.raises(LibraryError, match=r"none named 'one'"):
        library.rollback("one")
    library.snapshot("one")  # although `main` named what was collected


def test_names_of_snapshots_are_given_once(make_library: MakeLibrary, make_adapter: MakeAdapter) -> None:
    library = make_library("lib", a=1.0)
    assert library.snapshot("s") == library.snapshot("s")
    library.remove("a")
    with pytest.raises(LibraryError, match=r"(?s)name of its own.*'s' is taken, by one with 1 adapters"):
        library.snapshot("s")
    for name in ("main", "../x", "", "a" * 101):
        with pytest.raises(UsageError, match="name of a snapshot"):
            library.snapshot(name)
    with pytest.raises(LibraryError, match=r"(?s)none named 't'.*it has s"):
        library.rollback("t")


def test_a_damaged_snapshot_changes_nothing(make_library: MakeLibrary) -> None:
    library = make_library("lib", a=1.0)
    library.snapshot("s")
    weights = (library.path / "adapters" / "a" / "adapter_model.safetensors").stat().st_ino
    library.remove("a")
    (damaged,) = (path for path in (library.path / ".snapshots/objects").iterdir() if path.stat().st_ino == weights)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\1")
    with pytest.raises(LibraryError, match="sha256"):
        library.rollback("s")
    assert library.names() == []


def test_names_of_objects_are_forced_to_the_disk_before_a_ref(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, link = os.fsync, os.link

    def noted_fsync(descriptor: int) -> None:
        calls.append("fsync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def noted_link(source: Path, target: Path) -> None:
        calls.append(f"link {target.name}")
        link(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "link", noted_link)
    store = FolderStore(tmp_path / "remote", Traffic())
    store.create("objects/aa", b"data")
    store.create("refs/v1", b"aa")
    assert calls.index("link aa") < calls.index("fsync objects") < calls.index("link v1") < calls.index("fsync refs")
