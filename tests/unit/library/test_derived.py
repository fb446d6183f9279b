"""Derived documents: keyed by their inputs, atomic, held to their hashes."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorary.errors import LibraryError, UsageError
from lorary.library.derived import derived_folder, iterate_derived, load_derived, save_derived
from lorary.library.handles import Folder

KEY = {"adapters": {"a": "12", "b": "34"}, "settings": {"k": 3, "sparsity": 0.5}}
FILES = {"clusters.json": b"{}", "similarity.safetensors": b"\x00\x01"}


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    folder = save_derived(tmp_path, "clusters", KEY, FILES)
    assert folder == derived_folder(tmp_path, "clusters", KEY)
    assert load_derived(tmp_path, "clusters", KEY) == FILES


def test_another_key_or_kind_finds_nothing(tmp_path: Path) -> None:
    save_derived(tmp_path, "clusters", KEY, FILES)
    assert load_derived(tmp_path, "clusters", {**KEY, "adapters": {"a": "12", "b": "35"}}) is None
    assert load_derived(tmp_path, "poly", KEY) is None


@given(st.permutations(list(KEY.items())))
def test_the_order_of_a_key_does_not_matter(items: list[tuple[str, object]]) -> None:
    assert derived_folder(Path("lib"), "clusters", dict(items)) == derived_folder(Path("lib"), "clusters", KEY)


def test_an_equal_document_stays_untouched_and_another_takes_its_place(tmp_path: Path) -> None:
    folder = save_derived(tmp_path, "clusters", KEY, FILES)
    inode = folder.stat().st_ino
    assert save_derived(tmp_path, "clusters", KEY, FILES).stat().st_ino == inode
    assert save_derived(tmp_path, "clusters", KEY, {"clusters.json": b"[]"}).stat().st_ino != inode
    assert load_derived(tmp_path, "clusters", KEY) == {"clusters.json": b"[]"}
    assert not (tmp_path / ".staging").exists()


def test_a_write_that_fails_leaves_the_old_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_derived(tmp_path, "clusters", KEY, FILES)

    def full(folder: Folder, name: str, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Folder, "write", full)
    with pytest.raises(LibraryError, match="free some space"):
        save_derived(tmp_path, "clusters", KEY, {"clusters.json": b"[]"})
    assert load_derived(tmp_path, "clusters", KEY) == FILES


def test_a_damaged_document_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_derived(tmp_path, "clusters", KEY, FILES)
    (folder / "clusters.json").write_bytes(b"{ }")
    with pytest.raises(LibraryError, match=f"{folder.name} must hold .*\nfound: clusters.json has sha256"):
        load_derived(tmp_path, "clusters", KEY)
    (folder / "clusters.json").unlink()
    with pytest.raises(LibraryError, match=r"clusters.json: No such file"):
        list(iterate_derived(tmp_path, "clusters"))


def test_documents_of_a_kind_are_listed_with_their_keys(tmp_path: Path) -> None:
    assert list(iterate_derived(tmp_path, "poly")) == []
    for seed in range(3):
        save_derived(tmp_path, "poly", {"seed": seed}, FILES)
    save_derived(tmp_path, "poly_z", KEY, FILES)
    assert sorted(entry.key["seed"] for entry in iterate_derived(tmp_path, "poly")) == [0, 1, 2]


@pytest.mark.parametrize("kind", ["", "../up", "Clusters", "a-b"])
def test_a_kind_that_could_leave_its_folder_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UsageError, match="a kind of derived data"):
        save_derived(tmp_path, kind, KEY, FILES)


@pytest.mark.parametrize("name", ["../a.json", "entry.json", "", ".."])
def test_a_file_name_that_is_not_plain_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="plain name"):
        save_derived(tmp_path, "clusters", KEY, {name: b""})


def test_a_foreign_document_does_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    folder = save_derived(tmp_path, "clusters", KEY, FILES)
    (tmp_path / "secret").write_text("x")
    entry = json.loads((folder / "entry.json").read_text())
    entry["files"]["../../secret"] = "0" * 64
    (folder / "entry.json").write_text(json.dumps(entry))
    with pytest.raises(LibraryError, match="secret"):
        load_derived(tmp_path, "clusters", KEY)
