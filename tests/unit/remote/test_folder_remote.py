"""Push, pull and clone over a remote in a local folder."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lorary.adapter import Adapter
from lorary.errors import AdapterError, LibraryError, LoraryError, UsageError
from lorary.library.derived import load_derived, save_derived
from lorary.library.files import sha256
from lorary.library.fingerprint import Fingerprint
from lorary.library.store import Library
from lorary.remote.arrivals import Arrivals
from lorary.remote.clone import clone_library
from lorary.remote.entries import encode
from lorary.remote.folder import FolderStore
from lorary.remote.pull import pull_library
from lorary.remote.push import push_library
from lorary.remote.store import StaleError, Traffic, TransientError

MakeLibrary = Callable[..., Library]
MakeAdapter = Callable[..., Adapter]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "remote")


def content(library: Path) -> dict[str, bytes]:
    """All that a reader of a library sees."""
    return {
        str(path.relative_to(library)): path.read_bytes()
        for path in sorted(library.rglob("*"))
        if path.is_file() and not path.relative_to(library).parts[0].startswith(".")
    }


def test_a_clone_has_all_that_was_pushed_byte_for_byte(make_library: MakeLibrary, tmp_path: Path, url: str) -> None:
    library = make_library("lib", a=1.0, b=2.0)
    save_derived(library.path, "centroid", {"seed": 1}, {"x.json": b"{}"})
    assert push_library(library.path, url).sent == ["a", "b"]
    assert clone_library(url, tmp_path / "copy").received == ["a", "b"]
    copy = Library.open(tmp_path / "copy")
    assert copy.verify() == []
    assert content(copy.path) == content(library.path)
    assert load_derived(copy.path, "centroid", {"seed": 1}) == {"x.json": b"{}"}
    assert not (tmp_path / ".copy.clone").exists()


def test_a_second_push_and_pull_move_only_what_changed(
    make_library: MakeLibrary, make_adapter: MakeAdapter, tmp_path: Path, url: str
) -> None:
    library = make_library("lib", a=1.0, b=2.0)
    first = push_library(library.path, url)
    clone_library(url, tmp_path / "copy")
    nothing = push_library(library.path)
    assert (nothing.sent, nothing.bytes_sent, nothing.snapshot) == ([], 0, first.snapshot)
    library.replace_adapter(make_adapter("b", 3.0), {"tasks": ["b"]})
    library.add_adapter(make_adapter("c", 4.0), {"tasks": ["c"]})
    library.remove("a")
    before = len(list(Path(url, "objects").iterdir()))
    second = push_library(library.path)
    assert (second.sent, second.removed) == (["b", "c"], ["a"])
    # Weights and provenance of b and c, a page and an index; their configuration was there.
    assert len(list(Path(url, "objects").iterdir())) == before + 6
    pulled = pull_library(tmp_path / "copy")
    assert (pulled.received, pulled.removed) == (["b", "c"], ["a"])
    assert content(tmp_path / "copy") == content(library.path)
    assert pull_library(tmp_path / "copy").received == []


def test_libraries_that_changed_apart_are_joined_and_a_conflict_is_named(
    make_library: MakeLibrary, make_adapter: MakeAdapter, tmp_path: Path, url: str
) -> None:
    library = make_library("lib", a=1.0, b=2.0)
    push_library(library.path, url)
    clone_library(url, tmp_path / "copy")
    copy = Library.open(tmp_path / "copy")
    library.add_adapter(make_adapter("mine", 3.0), {"tasks": []})
    copy.add_adapter(make_adapter("theirs", 4.0), {"tasks": []})
    push_library(copy.path)
    assert push_library(library.path).sent == ["mine"]
    # A push takes nothing into the library, and a later one does not take that for a removal.
    push_library(library.path)
    assert pull_library(library.path).received == ["theirs"]
    assert library.names() == ["a", "b", "mine", "theirs"]

    library.replace_adapter(make_adapter("a", 5.0), {"tasks": []})
    pull_library(copy.path)
    copy.replace_adapter(make_adapter("a", 6.0), {"tasks": []})
    push_library(copy.path)
    state = content(library.path)
    for act in (push_library, pull_library):
        with pytest.raises(LibraryError, match="changed on both: adapter 'a'"):
            act(library.path)
    assert content(library.path) == state
    pull_library(library.path, overwrite=True)
    assert content(library.path) == content(copy.path)


def test_a_router_and_a_removal_travel_and_an_overwriting_push_wins(
    make_library: MakeLibrary, make_adapter: MakeAdapter, tmp_path: Path, url: str
) -> None:
    library = make_library("lib", a=1.0, b=2.0)
    push_library(library.path, url)
    clone_library(url, tmp_path / "copy")
    copy = Library.open(tmp_path / "copy")
    copy.set_default_router({**copy.default_router, "top_k": 2})
    copy.replace_adapter(make_adapter("a", 6.0), {"tasks": []})
    push_library(copy.path)
    library.remove("a")
    with pytest.raises(LibraryError, match="adapter 'a'"):
        push_library(library.path)
    assert push_library(library.path, overwrite=True).removed == ["a"]
    pull_library(copy.path)
    assert Library.open(copy.path).names() == ["b"]
    pull_library(library.path)
    assert Library.open(library.path).default_router["top_k"] == 2


def test_pushes_at_once_lose_nothing(make_library: MakeLibrary, tmp_path: Path, url: str) -> None:
    libraries = [make_library(f"lib{number}", **{f"x{number}": 1.0, f"y{number}": 2.0}) for number in range(4)]
    start, errors = threading.Barrier(len(libraries)), []

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
    clone_library(url, tmp_path / "copy")
    assert Library.open(tmp_path / "copy").names() == sorted(f"{word}{n}" for n in range(4) for word in "xy")


def test_a_push_that_was_overtaken_joins_with_the_other(
    make_library: MakeLibrary, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_library(make_library("first", a=1.0).path, url)
    other, library = make_library("other", b=2.0), make_library("lib", c=3.0)
    replace, pending = FolderStore.replace, [other]

    def overtaken(store: FolderStore, key: str, data: bytes, etag: str) -> None:
        if pending:
            push_library(pending.pop().path, url)
        replace(store, key, data, etag)

    monkeypatch.setattr(FolderStore, "replace", overtaken)
    push_library(library.path, url)
    clone_library(url, tmp_path / "copy")
    assert Library.open(tmp_path / "copy").names() == ["a", "b", "c"]


def test_a_named_snapshot_never_moves(make_library: MakeLibrary, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/remote"
    library = make_library("lib", a=1.0)
    first = push_library(library.path, f"{url}@v1")
    assert push_library(library.path, f"{url}@v1").snapshot == first.snapshot
    library.add_adapter(make_adapter("b", 2.0), {"tasks": []})
    with pytest.raises(LibraryError, match=r"names [0-9a-f]{12} already"):
        push_library(library.path, f"{url}@v1")
    assert clone_library(url, tmp_path / "still").received == ["a"]
    push_library(library.path, f"{url}@v2")
    for ref, names in {"v1": ["a"], "v2": ["a", "b"], first.snapshot: ["a"], "main": ["a", "b"]}.items():
        assert clone_library(f"{url}@{ref}", tmp_path / ref).received == names
    with pytest.raises(LibraryError, match="under the ref 'v3'"):
        clone_library(f"{url}@v3", tmp_path / "none")
    with pytest.raises(UsageError, match="must go to main or make a name"):
        push_library(library.path, f"{url}@{first.snapshot}")


def test_a_push_that_broke_off_shows_nothing_and_goes_on(
    make_library: MakeLibrary, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = make_library("lib", a=1.0, b=2.0, c=3.0)
    create, left = FolderStore.create, [4]

    def breaking(store: FolderStore, key: str, data: bytes) -> bool:
        left[0] -= 1
        if left[0] < 0:
            raise LibraryError("the cable must be in its socket")
        return create(store, key, data)

    monkeypatch.setattr(FolderStore, "create", breaking)
    with pytest.raises(LibraryError, match="cable"):
        push_library(library.path, url)
    with pytest.raises(LibraryError, match="found: none of that name"):
        clone_library(url, tmp_path / "early")
    assert not (tmp_path / "early").exists()
    arrived = {path.name for path in Path(url, "objects").iterdir()}
    assert len(arrived) == 4
    put: list[str] = []
    monkeypatch.setattr(FolderStore, "create", lambda store, key, data: put.append(key) or create(store, key, data))
    push_library(library.path, url)
    assert not arrived & {key.rpartition("/")[2] for key in put}
    assert clone_library(url, tmp_path / "copy").received == ["a", "b", "c"]


@pytest.mark.parametrize("is_clone", [True, False], ids=["clone", "pull"])
def test_what_broke_off_goes_on_where_it_was(
    make_library: MakeLibrary, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, is_clone: bool
) -> None:
    push_library(make_library("lib", a=1.0, b=2.0).path, url)
    monkeypatch.setattr("lorary.remote.arrivals.CHUNK_BYTES", 100)
    monkeypatch.setattr("lorary.remote.workers.WORKERS", 1)
    read, starts, most = FolderStore.read, list[int](), [10_000]

    def breaking(store: FolderStore, key: str, start: int, length: int) -> bytes:
        if len(starts) == most[0]:
            raise LibraryError("the cable must be in its socket")
        starts.append(start)
        return read(store, key, start, length)

    def act(name: str) -> None:
        starts.clear()
        if is_clone:
            clone_library(url, tmp_path / name)
        else:
            pull_library(make_library(name).path if not (tmp_path / name).exists() else tmp_path / name, url)

    monkeypatch.setattr(FolderStore, "read", breaking)
    act("all")
    number = len(starts)
    most[0] = 7
    with pytest.raises(LibraryError, match="cable"):
        act("broken")
    assert not is_clone or not (tmp_path / "broken").exists()
    assert is_clone or Library.open(tmp_path / "broken").names() == []
    most[0] = 10_000
    act("broken")
    assert len(starts) == number - 7
    assert content(tmp_path / "broken") == content(tmp_path / "lib")


def damage_object(url: str, wanted: str, new: bytes | None) -> None:
    """Change the object of a file that holds some text."""
    for path in Path(url, "objects").iterdir():
        if wanted.encode() in path.read_bytes():
            path.unlink()
            if new is not None:
                path.write_bytes(new if new else path.name.encode())


def test_what_arrives_damaged_is_refused_and_nothing_is_installed(
    make_library: MakeLibrary, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorary.remote.store.FIRST_WAIT_S", 0.0)
    library = make_library("lib", a=1.0)
    push_library(library.path, url)
    size = len((library.path / "adapters/a/adapter_model.safetensors").read_bytes())
    damage_object(url, "lora_A", b"x" * size)
    with pytest.raises(LibraryError, match="must arrive with the sha256 and size of its index"):
        clone_library(url, tmp_path / "copy")
    damage_object(url, "x" * 64, None)
    with pytest.raises(LibraryError, match="must hold all that its index names"):
        clone_library(url, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_an_index_of_another_hash_is_refused_although_it_can_be_read(
    make_library: MakeLibrary, tmp_path: Path, url: str
) -> None:
    library = make_library("lib", a=1.0, b=2.0)
    push_library(library.path, url)
    (page,) = (path for path in Path(url, "objects").iterdir() if b'"adapters/a"' in path.read_bytes())
    page.write_bytes(page.read_bytes().replace(b'"adapters/a"', b'"adapters/c"'))
    with pytest.raises(LibraryError, match="an object of sha256"):
        clone_library(url, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def write_remote(url: str, entries: dict[str, Any]) -> None:
    """A remote of whatever entries."""
    objects = Path(url, "objects")
    objects.mkdir(parents=True)

    def put(data: bytes) -> list[Any]:
        (objects / sha256(data)).write_bytes(data)
        return [sha256(data), len(data)]

    named = {entry: {file: put(data) if isinstance(data, bytes) else data for file, data in files.items()}
             for entry, files in entries.items()}  # fmt: skip
    index = encode({"format_version": 1, "pages": {"": put(encode({"entries": named}))}})
    Path(url, "refs").mkdir()
    Path(url, "refs", "main").write_bytes(encode({"format_version": 1, "snapshot": put(index)[0]}))


def files_of(library: Library, name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (library.path / "adapters" / name).iterdir()}


@pytest.mark.parametrize(
    "entry",
    ["adapters/../../x", "adapters/a/b", "adapters/.x", "adapters", "derived/x", "derived/../k-0123456789abcdef",
     "results/x", "library/x", ".build/x", "adapters/\n"],
)  # fmt: skip
def test_an_entry_that_leads_elsewhere_is_refused(
    make_library: MakeLibrary, tmp_path: Path, url: str, entry: str
) -> None:
    library = make_library("lib", a=1.0)
    document = {"library": {"library.json": (library.path / "library.json").read_bytes()}}
    write_remote(url, {**document, entry: files_of(library, "a")})
    with pytest.raises(LibraryError, match="must hold the index of a library"):
        clone_library(url, tmp_path / "copy")
    with pytest.raises(LibraryError, match="must hold the index of a library"):
        pull_library(library.path, url)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name in ("x", "copy")) == []


BAD_RECORDS: list[Any] = [["a" * 63, 3], ["a" * 64, -1], ["a" * 64, 2**60], ["a" * 64], 7, ["../" * 22, 3], None]


@pytest.mark.parametrize("record", BAD_RECORDS)
def test_a_record_that_is_none_is_refused(make_library: MakeLibrary, tmp_path: Path, url: str, record: Any) -> None:
    write_remote(url, {"library": {"library.json": record}})
    with pytest.raises(LibraryError, match="in the place of a sha256 and a size"):
        clone_library(url, tmp_path / "copy")


def test_an_adapter_is_checked_as_one_that_is_added(
    make_library: MakeLibrary, make_adapter: MakeAdapter, tmp_path: Path, url: str
) -> None:
    library = make_library("lib", good=1.0)
    files = files_of(library, "good")
    weights = safetensors.torch.load(files["adapter_model.safetensors"])
    nan = {key: torch.full_like(tensor, torch.nan) for key, tensor in weights.items()}
    wide = {key: torch.ones(2, 16) if "lora_A" in key else tensor for key, tensor in weights.items()}
    bad = {
        "NaN": {**files, "adapter_model.safetensors": safetensors.torch.save(nan)},
        "d_in": {**files, "adapter_model.safetensors": safetensors.torch.save(wide)},
        "whole safetensors": {**files, "adapter_model.safetensors": b"\x80\x04pickle"},
        "content hash": {**files, "provenance.json": files["provenance.json"].replace(b'_hash": "', b'_hash": "0')},
        "one JSON object": {**files, "provenance.json": b"[]"},
    }  # fmt: skip
    for number, (message, changed) in enumerate(bad.items()):
        if "provenance" not in message and changed["provenance.json"] == files["provenance.json"]:
            provenance = json.loads(files["provenance.json"])
            provenance["files"]["adapter_model.safetensors"] = sha256(changed["adapter_model.safetensors"])
            changed["provenance.json"] = json.dumps(provenance).encode()
        place = f"{url}{number}"
        document = {"library": {"library.json": (library.path / "library.json").read_bytes()}}
        write_remote(place, {**document, "adapters/bad": changed, "adapters/good": files})
        before = content(library.path)
        with pytest.raises((AdapterError, LibraryError), match=message):
            pull_library(library.path, place)
        with pytest.raises((AdapterError, LibraryError), match=message):
            clone_library(place, tmp_path / "copy")
        assert content(library.path) == before
        assert not (tmp_path / "copy").exists()


def test_derived_data_of_another_key_is_refused(make_library: MakeLibrary, tmp_path: Path, url: str) -> None:
    library = make_library("lib")
    made = save_derived(library.path, "centroid", {"seed": 1}, {"x.json": b"{}"})
    files = {path.name: path.read_bytes() for path in made.iterdir()}
    document = {"library": {"library.json": (library.path / "library.json").read_bytes()}}
    write_remote(url, {**document, "derived/centroid-0123456789abcdef": files})
    with pytest.raises(LibraryError, match="derived from something else"):
        clone_library(url, tmp_path / "copy")


def test_lines_of_results_are_joined_where_they_are_asked_for(
    make_library: MakeLibrary, tmp_path: Path, url: str
) -> None:
    library = make_library("lib", a=1.0)
    lines = {key: json.dumps({"key": key, "value": 1}).encode() + b"\n" for key in "xyz"}
    path = library.path / "results" / "evaluation.jsonl"
    path.parent.mkdir()
    path.write_bytes(lines["x"] + lines["y"] + b'{"key": "cut')
    push_library(library.path, url)
    clone_library(url, tmp_path / "none")
    assert not (tmp_path / "none" / "results").exists()
    push_library(library.path, url, results=True)
    clone_library(url, tmp_path / "copy", results=True)
    copied = tmp_path / "copy" / "results" / "evaluation.jsonl"
    assert copied.read_bytes() == lines["x"] + lines["y"]
    copied.write_bytes(lines["y"] + lines["z"])
    push_library(tmp_path / "copy", results=True)
    pull_library(library.path, results=True)
    assert [line for line in path.read_bytes().splitlines() if line] == [
        lines["x"].strip(), lines["y"].strip(), b'{"key": "cut', lines["z"].strip(),
    ]  # fmt: skip
    push_library(library.path)
    assert clone_library(url, tmp_path / "kept", results=True).received == ["a"]
    assert (tmp_path / "kept" / "results" / "evaluation.jsonl").read_bytes().count(b"\n") == 3


def test_a_remote_is_opened_for_reading_from_a_copy(
    make_library: MakeLibrary, make_adapter: MakeAdapter, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import lorary

    monkeypatch.setenv("LORARY_CACHE", str(tmp_path / "cache"))
    library = make_library("lib", a=1.0)
    pushed = push_library(library.path, url)
    opened = lorary.Library.open(f"file://{url}")
    assert (opened.names(), opened.verify(), opened.name) == (["a"], [], "remote")
    for act in (
        lambda: opened.remove("a"),
        lambda: opened.add_adapter(make_adapter("b"), {"tasks": []}),
        lambda: opened.build_lock().__enter__(),
        lambda: save_derived(opened.path, "centroid", {}, {}),
    ):
        with pytest.raises(LibraryError, match="lorary library clone"):
            act()
    library.remove("a")
    push_library(library.path)
    assert lorary.Library.open(f"file://{url}").names() == []
    shutil.rmtree(url)
    assert lorary.Library.open(f"file://{url}@{pushed.snapshot}").names() == ["a"]
    with pytest.raises(UsageError, match="must be a local folder"):
        Library.create("s3://bucket/lib")


def test_only_a_place_that_fits_is_pushed_to_or_cloned_into(
    make_library: MakeLibrary, tmp_path: Path, url: str
) -> None:
    library = make_library("lib", a=1.0)
    with pytest.raises(LibraryError, match="a library itself"):
        push_library(library.path, str(make_library("other").path))
    with pytest.raises(UsageError, match="must have a remote"):
        pull_library(library.path)
    push_library(library.path, url)
    with pytest.raises(LibraryError, match="a library already"):
        clone_library(url, library.path)
    (library.path / "adapters/a/adapter_config.json").write_bytes(b"{}")
    with pytest.raises(LibraryError, match="must be whole to be pushed"):
        push_library(library.path)


def test_a_remote_of_another_base_is_refused(make_library: MakeLibrary, url: str) -> None:
    push_library(make_library("lib", a=1.0).path, url)
    other = make_library("other", b=1.0)
    path = other.path / "library.json"
    document = json.loads(path.read_text())
    fingerprint = Fingerprint.from_json(document["base"]["fingerprint"])
    samples = {name: tuple(value + 1 for value in values) for name, values in fingerprint.samples.items()}
    document["base"]["fingerprint"] = replace(fingerprint, samples=samples).to_json()
    path.write_text(json.dumps(document))
    for act in (push_library, pull_library):
        with pytest.raises(LoraryError, match="must have one base model"):
            act(other.path, url)


def test_a_request_that_fails_for_a_moment_is_repeated(
    make_library: MakeLibrary, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorary.remote.store.FIRST_WAIT_S", 0.0)
    push_library(make_library("lib", a=1.0).path, url)
    failures = [TransientError("reset by peer")] * 3
    read = FolderStore.read

    def flaky(store: FolderStore, *arguments: Any) -> bytes:
        if failures:
            raise failures.pop()
        return read(store, *arguments)

    monkeypatch.setattr(FolderStore, "read", flaky)
    clone_library(url, tmp_path / "copy")
    failures.extend([TransientError("reset by peer")] * 1000)
    with pytest.raises(LibraryError, match="reset by peer, in each of 6 attempts"):
        clone_library(url, tmp_path / "again")


def test_a_link_among_arrivals_leads_nowhere(make_library: MakeLibrary, tmp_path: Path, url: str) -> None:
    push_library(make_library("lib", a=1.0).path, url)
    target, outside = make_library("target"), tmp_path / "outside"
    outside.mkdir()
    (target.path / ".remote").mkdir()
    (target.path / ".remote" / "arriving").symlink_to(outside)
    with pytest.raises(LibraryError, match="no link in a library is followed"):
        pull_library(target.path, url)
    assert list(outside.iterdir()) == []


def test_a_folder_store_creates_once_and_replaces_what_was_read(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store", Traffic())
    assert store.create("refs/main", b"1")
    assert not store.create("refs/main", b"2")
    fetched = store.get("refs/main")
    assert fetched.data == b"1"
    store.replace("refs/main", b"3", fetched.etag)
    with pytest.raises(StaleError):
        store.replace("refs/main", b"4", fetched.etag)
    assert store.get("refs/main").data == b"3"
    assert (store.size("refs/main"), store.size("refs/none")) == (1, None)
    assert (store.list("refs/"), store.list("none/")) == ({"refs/main": 1}, {})
    assert sorted(path.name for path in (tmp_path / "store" / "refs").iterdir()) == ["main"]


def test_what_has_arrived_is_held_to_its_hash_again(tmp_path: Path) -> None:
    from lorary.remote.entries import record

    arrivals = Arrivals(tmp_path)
    (tmp_path / record(b"abc").sha256).write_bytes(b"abd")
    with pytest.raises(LibraryError, match="must stay as it arrived"):
        arrivals.read(record(b"abc"))


def test_an_object_that_ends_too_soon_is_asked_for_once_more_and_no_oftener(
    make_library: MakeLibrary, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("lorary.remote.store.time.sleep", waits.append)
    library = make_library("lib", a=1.0)
    push_library(library.path, url)
    damage_object(url, "lora_A", b"x" * 10)
    with pytest.raises(LibraryError, match=r"must arrive with the sha256 and size(?s:.)*it ends at byte 10, twice"):
        clone_library(url, tmp_path / "copy")
    assert len(waits) == 1


@pytest.mark.parametrize("place", ["refs/main", "objects/*"])
def test_a_ref_or_an_index_of_holes_is_refused_unread(
    make_library: MakeLibrary, tmp_path: Path, url: str, place: str
) -> None:
    push_library(make_library("lib", a=1.0).path, url)
    for path in Path(url).glob(place):
        os.truncate(path, 2**40)
    with pytest.raises(LibraryError, match="larger than 67,108,864 bytes"):
        clone_library(url, tmp_path / "copy")


def test_a_kept_part_of_an_index_that_is_damaged_is_fetched_anew(
    make_library: MakeLibrary, tmp_path: Path, url: str
) -> None:
    push_library(make_library("lib", a=1.0).path, url)
    clone_library(url, tmp_path / "copy")
    pull_library(tmp_path / "copy")
    kept = [path for path in (tmp_path / "copy" / ".remote").rglob("*") if len(path.name) == 64]
    assert kept
    for path in kept:
        path.unlink()
        os.mkfifo(path)
    with pytest.raises(LibraryError, match="a FIFO"):
        pull_library(tmp_path / "copy")
    for path in kept:
        path.unlink()
        path.touch()
        os.truncate(path, 2**40)
    assert pull_library(tmp_path / "copy").received == []
