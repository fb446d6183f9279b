"""A library of a stranger: links, FIFOs, sockets and folders in place of its own, and nothing outside is touched."""

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import lorary
from lorary.adapter import Adapter
from lorary.build.state import close_build, open_shards, remove_candidate, sweep
from lorary.errors import LibraryError, LoraryError
from lorary.evaluate.cache import ResultCache
from lorary.library.derived import iterate_derived, load_derived, save_derived
from lorary.library.handles import Folder, opened
from lorary.library.store import Library

MakeAdapter = Callable[..., Adapter]
FOLDERS = ("adapters", ".staging", "derived", "results", ".build", "logs")
FILES = ("library.json", "library.json.new", ".write.lock", ".build.lock", ".build.pid")
KEY = {"seed": 3}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Somebody's folder, with what a library has in it and more."""
    folder = tmp_path / "outside"
    for part in ("new/x", "adapters/x", "gone/x", "removed/x", "derived/clusters-0", "k-3", "old-k-3", "x"):
        (folder / part).mkdir(parents=True)
        (folder / part / "precious.txt").write_text("precious")
    (folder / "evaluation.jsonl").write_text("{}\n")
    (folder / "file").write_text("precious")
    return folder


@pytest.fixture
def filled(library: Library, make_adapter: MakeAdapter) -> Library:
    library.add_adapter(make_adapter("x"), {"tasks": ["t"]})
    library.add_adapter(make_adapter("y", 2.0), {"tasks": ["t"]})
    return library


def picture(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """All that is in a folder: kind, number and content of each name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        stat = path.lstat()
        found[str(path)] = (stat.st_mode, stat.st_ino, path.read_bytes() if path.is_file() else b"")
    return found


def actions(library: Library, make_adapter: MakeAdapter) -> list[Callable[[], object]]:
    """Every way to write below a library."""

    def build() -> None:
        with library.build_lock():
            open_shards(library.path, "key", ["x"], 1)
            close_build(library.path, "key")
            sweep(library.path)
            remove_candidate(library.path / ".build" / "k-3")

    return [
        lambda: library.add_adapter(make_adapter("z"), {}),
        lambda: library.replace_adapter(make_adapter("x", 3.0), {}),
        lambda: library.remove("x"),
        lambda: library.set_default_router({**library.default_router, "top_k": 2}),
        lambda: save_derived(library.path, "clusters", KEY, {"a.json": b"{}"}),
        lambda: ResultCache(library, "base").put("key", 1),
        build,
    ]


def refusal(act: Callable[[], object]) -> LoraryError | None:
    """Act; the error of ours that it ends with, or None. Any other error fails the test."""
    try:
        act()
    except LoraryError as error:
        return error
    return None


def put_in_place(place: Path, kind: str, outside: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    if kind == "link":
        place.symlink_to(outside if place.name in FOLDERS else outside / "file")
    elif kind == "dangling":
        place.symlink_to(outside / "not-there")
    elif kind == "loop":
        place.symlink_to(place.name)
    elif kind == "device":
        place.symlink_to("/dev/null")
    elif kind == "fifo":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.write_text("")


@pytest.mark.parametrize("kind", ["link", "dangling", "loop", "device", "fifo", "other"])
@pytest.mark.parametrize("name", [*FOLDERS, *FILES])
def test_what_stands_in_place_of_a_librarys_own_is_refused_and_nothing_outside_is_touched(
    filled: Library, make_adapter: MakeAdapter, outside: Path, name: str, kind: str
) -> None:
    library = Library.open(filled.path)
    kind = kind if kind != "other" else ("file" if name in FOLDERS else "folder")
    put_in_place(library.path / name, kind, outside)
    before = picture(outside), picture(library.path)
    refused = 0
    for act in actions(library, make_adapter):
        error = refusal(act)
        if error is not None:
            assert str(library.path / name) in str(error)
            refused += 1
        assert picture(outside) == before[0]
    assert refused >= 6
    if refused == 7:
        changed = {path for path, _ in before[1].items() ^ picture(library.path).items()}
        assert all(path.endswith((".lock", "/results", "evaluation.jsonl")) for path in changed)


@pytest.mark.parametrize("name", [name for name in (*FOLDERS, *FILES) if name != "library.json"])
def test_verifying_names_what_is_a_link(filled: Library, outside: Path, name: str) -> None:
    put_in_place(filled.path / name, "link", outside)
    problems = filled.verify()
    assert [problem.adapter for problem in problems] == [name]
    assert problems[0].found == "a symbolic link"


def test_verifying_names_links_fifos_and_sockets_wherever_they_lie(filled: Library, tmp_path: Path) -> None:
    save_derived(filled.path, "clusters", KEY, {"a.json": b"{}"})
    (filled.path / "derived" / "link").symlink_to(tmp_path)
    (filled.path / "results").mkdir()
    os.mkfifo(filled.path / "results" / "evaluation.jsonl")
    (filled.path / ".build" / "k-3").mkdir(parents=True)
    (filled.path / ".build" / "k-3" / "library.json").symlink_to("/etc/hostname")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(filled.path / "adapters" / "y" / "socket"))
        names = [problem.adapter for problem in filled.verify()]
    assert names == [".build/k-3/library.json", "adapters/y/socket", "derived/link", "results/evaluation.jsonl", "y"]


@pytest.mark.parametrize("target", ["outside", "nowhere", "x"])
def test_an_adapter_that_is_a_link_is_named_and_the_others_are_read(
    filled: Library, make_adapter: MakeAdapter, outside: Path, target: str
) -> None:
    shutil.rmtree(filled.path / "adapters" / "x")
    where = {"outside": filled.path / "adapters" / "y", "nowhere": outside / "nowhere", "x": "x"}[target]
    (filled.path / "adapters" / "x").symlink_to(where)
    before = picture(filled.path), picture(outside)
    assert filled.names() == ["x", "y"]
    for act in (
        lambda: filled.get("x"),
        lambda: filled.shapes("x"),
        lambda: filled.provenance("x"),
        lambda: filled.remove("x"),
        lambda: filled.replace_adapter(make_adapter("x"), {}),
        filled.describe,
    ):
        with pytest.raises(LibraryError, match=r"(?s)adapters/x must be .* link"):
            act()
    assert (picture(filled.path), picture(outside)) == before
    rows, problems = filled.listing()
    assert ([row["name"] for row in rows], list(problems)) == (["y"], ["x"])
    assert [problem.adapter for problem in filled.verify()] == ["x"]


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "provenance.json"])
@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "loop"])
def test_a_file_of_an_adapter_that_is_no_plain_file_is_named_without_waiting(
    filled: Library, outside: Path, tmp_path: Path, file: str, kind: str
) -> None:
    place = filled.path / "adapters" / "x" / file
    shutil.copy(place, outside / "file")
    put_in_place(place, kind, outside)
    for act in (lambda: filled.get("x"), lambda: filled.shapes("x"), lambda: filled.provenance("x")):
        with pytest.raises(LibraryError, match=f"adapters/x/{file} must be"):
            act()
    assert filled.get("y").name == "y"
    assert {problem.adapter for problem in filled.verify()} >= {"x"}


@pytest.mark.parametrize("place", ["derived/clusters", "derived/clusters/a.json", "derived/clusters/entry.json"])
def test_derived_data_behind_a_link_are_refused(filled: Library, outside: Path, place: str) -> None:
    folder = save_derived(filled.path, "clusters", KEY, {"a.json": b"{}"})
    real = Path(str(filled.path / place).replace("derived/clusters", str(folder.relative_to(filled.path))))
    moved = shutil.move(real, outside / "moved")
    real.symlink_to(moved)
    before = picture(outside)
    for act in (
        lambda: load_derived(filled.path, "clusters", KEY),
        lambda: list(iterate_derived(filled.path, "clusters")),
    ):
        with pytest.raises(LibraryError, match="link"):
            act()
    if real == folder:
        with pytest.raises(LibraryError, match="link"):
            save_derived(filled.path, "clusters", KEY, {"a.json": b"[]"})
    else:
        save_derived(filled.path, "clusters", KEY, {"a.json": b"[]"})
        assert load_derived(filled.path, "clusters", KEY) == {"a.json": b"[]"}
    assert picture(outside) == before


def test_results_behind_a_link_or_a_fifo_are_refused(filled: Library, outside: Path) -> None:
    file = filled.path / "results" / "evaluation.jsonl"
    file.parent.mkdir()
    for kind in ("link", "dangling", "fifo", "folder"):
        put_in_place(file, kind, outside)
        with pytest.raises(LibraryError, match=r"evaluation.jsonl must be"):
            ResultCache(filled, "base")
        put_in_place(file, "file", outside)
        cache = ResultCache(filled, "base")
        put_in_place(file, kind, outside)
        with pytest.raises(LibraryError, match=r"evaluation.jsonl must be"):
            cache.put("key", 1)
    assert (outside / "file").read_text() == "precious"


def test_results_that_share_their_body_with_another_name_get_one_of_their_own(filled: Library, outside: Path) -> None:
    ResultCache(filled, "base").put("one", 1)
    os.link(filled.path / "results" / "evaluation.jsonl", outside / "copy")
    before = (outside / "copy").read_text()
    ResultCache(filled, "base").put("two", 2)
    assert (outside / "copy").read_text() == before
    again = ResultCache(filled, "base")
    assert (again.get("one"), again.get("two")) == (1, 2)


@pytest.mark.parametrize(
    "place", ["committed", "committed/adapters", "committed/adapters/x", "committed/gone", "new", "removed", "done"]
)
def test_clearing_up_after_a_killed_writer_does_not_leave_the_library(
    filled: Library, make_adapter: MakeAdapter, outside: Path, place: str
) -> None:
    staged = filled.path / ".staging" / place
    staged.parent.mkdir(parents=True)
    staged.symlink_to(outside)
    before = picture(outside)
    for act in actions(filled, make_adapter)[:5]:
        with pytest.raises(LibraryError, match=rf"\.staging/{place} must be .*\nfound: a symbolic link"):
            act()
    assert picture(outside) == before


def test_what_no_writer_made_stays_when_a_writer_clears_up(filled: Library, make_adapter: MakeAdapter) -> None:
    mine = filled.path / ".staging" / "mine" / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    half = filled.path / ".staging" / "new" / "half"
    half.mkdir(parents=True)
    (half / "link").symlink_to(mine)
    filled.add_adapter(make_adapter("z"), {})
    assert mine.read_text() == "precious"
    assert not half.parent.exists()
    assert filled.names() == ["x", "y", "z"]


@pytest.mark.parametrize("place", [".build/k-3", ".build/key.json", ".build/key.tmp", ".build/old-k-3", "logs/a.jsonl"])
def test_the_state_of_a_build_behind_a_link_is_refused_before_the_build(
    filled: Library, outside: Path, place: str
) -> None:
    (filled.path / place).parent.mkdir()
    (filled.path / place).symlink_to(outside)
    before = picture(outside)
    with pytest.raises(LibraryError, match=f"{place} must be"), filled.build_lock():
        pass
    assert picture(outside) == before


@contextmanager
def swapped(call: str, number: int, folder: Path, outside: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put a link in the place of a folder just before a call of the operating system of some number."""
    calls, original = iter(range(10_000)), getattr(os, call)

    def wrapped(*args: Any, **keywords: Any) -> Any:
        if next(calls) == number and folder.is_dir() and not folder.is_symlink():
            os.rename(folder, folder.with_name(f"{folder.name}-away"))
            folder.symlink_to(outside)
        return original(*args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, wrapped)
        yield


@pytest.mark.parametrize("name", ["adapters", ".staging", ".staging/new", "derived", "results", ".build"])
def test_a_folder_that_becomes_a_link_between_check_and_use_leads_nowhere(
    filled: Library, make_adapter: MakeAdapter, outside: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_derived(filled.path, "other", KEY, {"a.json": b"{}"})
    before, pristine = picture(outside), filled.path.with_name("pristine")
    shutil.copytree(filled.path, pristine)
    for call in ("open", "mkdir", "rename", "unlink", "fsync"):
        for number in range(4) if call in ("rename", "mkdir") else range(0, 28, 7):
            for act in actions(filled, make_adapter)[::2]:
                with swapped(call, number, filled.path / name, outside, monkeypatch):
                    refusal(act)
                assert picture(outside) == before
                for entry in filled.path.iterdir():
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
                shutil.copytree(pristine, filled.path, dirs_exist_ok=True)


def test_a_library_is_reached_through_a_link_as_through_its_path(
    filled: Library, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(filled.path)
    library = Library.open(tmp_path / "link")
    library.add_adapter(make_adapter("z"), {})
    library.remove("x")
    with library.build_lock():
        pass
    assert filled.names() == library.names() == ["y", "z"]
    assert library.verify() == []
    assert (tmp_path / "link").is_symlink()


def test_an_empty_folder_with_a_link_in_it_becomes_no_library(tmp_path: Path, tiny_base_folder: Path) -> None:
    (tmp_path / "lib").mkdir()
    for name in ("library.json.new", ".write.lock"):
        (tmp_path / "lib" / name).symlink_to(tmp_path / "target")
        with pytest.raises(LibraryError, match=name):
            Library.create(tmp_path / "lib", tiny_base_folder)
        (tmp_path / "lib" / name).unlink()
    assert not (tmp_path / "target").exists()


def test_a_folder_held_open_refuses_a_link_for_each_way_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "file")
    ways: list[Callable[[Folder], object]] = [
        lambda folder: folder.write("link", b""),
        lambda folder: folder.append("link"),
        lambda folder: folder.replace("b", b"", "link"),
        lambda folder: folder.remove_file("link"),
        lambda folder: folder.remove_folder("link"),
        lambda folder: folder.read("link"),
    ]
    for way in ways:
        with opened(tmp_path / "a") as folder, pytest.raises((LibraryError, OSError), match="link"):
            way(folder)
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("name", [".staging", "derived", "derived/clusters"])
def test_clustering_a_library_with_a_link_is_refused_before_the_work(
    filled: Library, make_adapter: MakeAdapter, outside: Path, name: str
) -> None:
    filled.add_adapter(make_adapter("z", 3.0), {})
    if name == "derived/clusters":
        folder = lorary.cluster(str(filled.path), k=2).folder
        assert folder is not None
        shutil.rmtree(folder)
        place = folder
    else:
        place = filled.path / name
    place.symlink_to(outside)
    before = picture(outside)
    with pytest.raises(LibraryError, match=r"must be .*\nfound: a symbolic link"):
        lorary.cluster(str(filled.path), k=2)
    assert picture(outside) == before
