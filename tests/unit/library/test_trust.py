"""A library that others write to, move, delete or damage while it is open: one moment is read, and errors are ours."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lorary
from lorary.adapter import Adapter
from lorary.errors import AdapterError, LibraryError, UsageError
from lorary.evaluate.cache import ResultCache
from lorary.library import readers
from lorary.library.derived import iterate_derived, load_derived, save_derived
from lorary.library.folders import COMMITTED
from lorary.library.layout import ADAPTERS, STAGING
from lorary.library.store import Library
from lorary.remote.results import read_results
from lorary.remote.scan import scan

MakeAdapter = Callable[..., Adapter]
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture
def filled(library: Library, make_adapter: MakeAdapter) -> Library:
    for number, name in enumerate(("a", "b", "c")):
        library.add_adapter(make_adapter(name, float(number + 1)), {"tasks": [name]})
    return library


def edit(library: Library, name: str, **changes: Any) -> None:
    path = library.path / "adapters" / name / "provenance.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def beside_a_writer(write: Callable[[], object], read: Callable[[], None], seconds: float = 1.5) -> None:
    """Read for a while beside a process that writes all the time."""
    child = os.fork()
    if not child:
        try:
            while True:
                write()
        finally:
            os._exit(1)
    try:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            read()
    finally:
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_readers_beside_a_writer_that_replaces_see_no_file_vanish(filled: Library, make_adapter: MakeAdapter) -> None:
    turns = iter(range(10**9))

    def read() -> None:
        assert filled.names() == ["a", "b", "c"]
        assert set(filled.shapes("b")) == set(filled.get("b").modules)
        assert filled.provenance("b")["tasks"] == ["b"]
        assert [row["name"] for row in filled.describe()] == ["a", "b", "c"]
        assert filled.verify() == []

    def write() -> None:
        filled.replace_adapter(make_adapter("b", float(next(turns) % 2 + 1)), {"tasks": ["b"]})

    beside_a_writer(write, read)


def test_a_listing_shows_one_moment(filled: Library, make_adapter: MakeAdapter) -> None:
    def write() -> None:
        # At each moment at most one of them is missing, and never `b` while `a` is.
        for name in ("b", "a"):
            filled.remove(name)
            filled.add_adapter(make_adapter(name), {"tasks": [name]})

    def read() -> None:
        names = [row["name"] for row in filled.describe()]
        assert names in (["a", "b", "c"], ["a", "c"], ["b", "c"])
        assert filled.verify() == []

    beside_a_writer(write, read)


def test_derived_data_are_read_whole_beside_a_writer(filled: Library) -> None:
    values = iter(range(10**9))

    def read() -> None:
        files = load_derived(filled.path, "clusters", {})
        assert files is None or len({*files.values()}) == 1

    def write() -> None:
        value = str(next(values)).encode()
        save_derived(filled.path, "clusters", {}, dict.fromkeys(("a.json", "b.json", "c.json"), value))

    beside_a_writer(write, read, seconds=1.0)


def move(library: Library) -> None:
    os.rename(library.path, library.path.with_name("moved"))


def delete(library: Library) -> None:
    shutil.rmtree(library.path)


def empty(library: Library) -> None:
    move(library)
    library.path.mkdir()


def lose_the_document(library: Library) -> None:
    (library.path / "library.json").unlink()


def swap(library: Library) -> None:
    other = library.path.with_name("other")
    shutil.copytree(library.path, other)
    move(library)
    os.rename(other, library.path)


def other_base(library: Library) -> None:
    shutil.copy(library.path.with_name("strange") / "library.json", library.path)


@pytest.mark.parametrize("away", [move, delete, empty, lose_the_document, swap, other_base])
def test_a_library_that_is_no_longer_where_it_was_opened_is_refused_and_nothing_is_made(
    filled: Library,
    make_adapter: MakeAdapter,
    source: Path,
    tiny_model: Callable[..., Any],
    away: Callable[[Library], None],
) -> None:
    Library.create(filled.path.with_name("strange"), tiny_model(seed=1))
    library, cache = Library.open(filled.path), ResultCache(filled, "base")
    away(library)

    def build() -> None:
        with library.build_lock():
            pass

    before = sorted(library.path.parent.rglob("*"))
    for act in (
        lambda: library.add(source),
        lambda: library.add_adapter(make_adapter("z"), {}),
        lambda: library.replace_adapter(make_adapter("a"), {}),
        lambda: library.remove("a"),
        lambda: library.set_default_router(library.default_router),
        build,
        library.names,
        library.describe,
        library.verify,
        lambda: library.get("a"),
        lambda: library.shapes("a"),
        lambda: library.provenance("a"),
        lambda: cache.put("key", 1),
        lambda: ResultCache(library, "base"),
    ):
        with pytest.raises(LibraryError, match=r"must (stay where it was opened|be a library)"):
            act()
    assert sorted(library.path.parent.rglob("*")) == before


def test_a_library_whose_router_another_process_changed_stays_open(filled: Library, make_adapter: MakeAdapter) -> None:
    library = Library.open(filled.path)
    filled.set_default_router({**filled.default_router, "top_k": 2})
    library.add_adapter(make_adapter("z"), {})
    assert len(library) == 4


def test_clusters_need_all_adapters_and_name_all_that_cannot_be_read(filled: Library) -> None:
    edit(filled, "a", tasks=[7])
    edit(filled, "c", rank=None)
    with pytest.raises(LibraryError, match=r"(?s)'a'.*'c'"):
        lorary.cluster(str(filled.path), k=2)


@pytest.mark.parametrize(
    "value", [float("nan"), "\ud800", {1, 2}, 10**5000, b"x"], ids=["nan", "surrogate", "set", "digits", "bytes"]
)
def test_provenance_that_json_cannot_hold_is_wrong_usage(
    library: Library, make_adapter: MakeAdapter, value: object
) -> None:
    with pytest.raises(UsageError, match="provenance of adapter 'x' must hold values of JSON"):
        library.add_adapter(make_adapter("x"), {"note": value})
    assert library.names() == []


@pytest.mark.parametrize("file", ["adapters/a/provenance.json", "library.json"])
def test_large_documents_are_refused_before_they_are_parsed(filled: Library, file: str) -> None:
    with open(filled.path / file, "r+b") as stream:
        stream.truncate(100 * 1024 * 1024)
    for act in (lambda: filled.provenance("a"), lambda: Library.open(filled.path).provenance("a")):
        with pytest.raises(LibraryError, match=rf"(?s){file} must be readable.*larger than"):
            act()


def test_results_with_endless_or_nested_lines_are_passed_over(filled: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorary.library.result_lines.MAX_LINE_BYTES", 1000)
    ResultCache(filled, "base").put("one", 1)
    with open(filled.path / "results" / "evaluation.jsonl", "ab") as file:
        file.write(b"x" * 5000 + b"\n" + b"[" * 100_000 + b"\n\xff\xfe\n")
    ResultCache(filled, "base").put("two", 2)
    again = ResultCache(filled, "base")
    assert (again.get("one"), again.get("two")) == (1, 2)


def test_an_adapter_that_comes_back_after_an_error_is_read_anew(
    filled: Library, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = readers._read_identified, []

    def read_identified(library: Path, name: str, read: Any) -> Any:
        calls.append(name)
        if calls == ["a"]:  # missed between two changes of a writer
            filled.remove("a")
            filled.add_adapter(make_adapter("a", 9.0), {"tasks": ["a"]})
            raise LibraryError("there is no adapter 'a'")
        return real(library, name, read)

    monkeypatch.setattr(readers, "_read_identified", read_identified)
    assert readers.read_all(filled.path, lambda _folder, name: name) == {"a": "a", "b": "b", "c": "c"}


def test_an_adapter_that_is_moved_aside_within_one_tick_is_read_where_it_is(
    filled: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its times are those of before then, so that they do not tell that it moved."""
    identity = readers._identity
    monkeypatch.setattr(readers, "_identity", lambda folder: (found := identity(folder)) and (*found[:2], 0))
    aside = filled.path / STAGING / COMMITTED / ADAPTERS / "b"
    calls: list[Path] = []

    def read(folder: Path) -> str:
        calls.append(folder)
        if len(calls) == 1:
            aside.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(aside)
            raise LibraryError("a file was not there")
        return (folder / "provenance.json").read_text()

    assert '"b"' in readers.read_stable(filled.path, "b", read)
    assert calls == [filled.path / "adapters" / "b", aside]


def test_weights_of_holes_are_refused_by_name_before_they_are_read(filled: Library, tmp_path: Path) -> None:
    folder = shutil.copytree(filled.path / "adapters" / "a", tmp_path / "x")
    os.truncate(folder / "adapter_model.safetensors", 2**40)
    os.truncate(filled.path / "adapters" / "b" / "adapter_model.safetensors", 2**40)
    for act in (lambda: filled.add(folder), lambda: filled.get("b"), lambda: filled.shapes("b")):
        with pytest.raises(
            AdapterError, match=r"adapter_model.safetensors must be a whole(?s:.)*stand behind its header"
        ):
            act()
    assert [problem.adapter for problem in filled.verify()] == ["b"]
    with pytest.raises(LibraryError, match=r"'b' must be whole to be pushed(?s:.)*stand behind its header"):
        scan(filled, results=False)


def test_results_of_holes_are_refused_by_name(filled: Library) -> None:
    ResultCache(filled, "base").put("one", 1)
    os.truncate(filled.path / "results" / "evaluation.jsonl", 2**40)
    for act in (lambda: ResultCache(filled, "base"), lambda: read_results(filled.path)):
        with pytest.raises(LibraryError, match=r"results must be lines of JSON at(?s:.)*zero bytes"):
            act()


def test_a_key_of_what_is_no_json_is_damage(filled: Library) -> None:
    folder = save_derived(filled.path, "poly", {"x": 1}, {"a.json": b"{}"})
    (folder / "entry.json").write_text((folder / "entry.json").read_text().replace('"x": 1', '"x": Infinity'))
    with pytest.raises(LibraryError, match=r"must hold what was derived(?s:.)*not JSON compliant"):
        list(iterate_derived(filled.path, "poly"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("d_in", "1e999"), ("d_in", "true"), ("d_out", '"8"'), ("d_out", "0"), ("numbers", '["0-9999999"]'),
        ("numbers", '["5-3"]'), ("count", None),
    ],
)  # fmt: skip
def test_layers_that_no_model_has_make_a_library_damaged(filled: Library, field: str, value: str | None) -> None:
    path = filled.path / "library.json"
    document = json.loads(path.read_text())
    layers = document["base"]["fingerprint"]["layers"]
    layers[next(pattern for pattern in layers if "*" in pattern)][field] = "VALUE"
    path.write_text(json.dumps(document).replace('"VALUE"', value or "1"))
    if value is None or value == '["5-3"]':
        Library.open(filled.path)  # layers of no number are none
    else:
        with pytest.raises(LibraryError, match=r"library\.json must say"):
            Library.open(filled.path)
