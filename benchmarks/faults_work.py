"""The operations that `faults.py` disturbs, and what a reader sees of a library, a remote and an export."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorary.adapt.export_settings import PEFT, StaticSettings
from lorary.adapt.export_static import export_static
from lorary.adapter import Adapter, LoraFactors
from lorary.evaluate.cache import ResultCache, stored_values
from lorary.formats.peft import encode_adapter, read_adapter
from lorary.formats.peft_config import new_config
from lorary.library.derived import read_derived_files
from lorary.library.files import sha256
from lorary.library.layout import LIBRARY_FILE
from lorary.library.prepared import Prepared, expert_key, save_prepared
from lorary.library.store import Library
from lorary.remote.clone import clone_library
from lorary.remote.opening import open_remote
from lorary.remote.place import parse_place
from lorary.remote.pull import pull_library
from lorary.remote.push import push_library
from lorary.remote.whole import read_whole

LAYER = "model.layers.0.self_attn.q_proj"
HIDDEN = 16
# Each step that is acknowledged.
Work = Callable[[Path], Iterator[None]]
State = Any


def tiny_model() -> Any:
    """A random Llama of a few thousand weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=HIDDEN, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, vocab_size=300,
        )  # fmt: skip
        return LlamaForCausalLM(config).requires_grad_(False).eval()


def adapter_of(name: str, value: float) -> Adapter:
    """An adapter of rank 1 whose weights all have one value."""
    factors = LoraFactors(torch.full((1, HIDDEN), value), torch.full((HIDDEN, 1), value), 2.0)
    return Adapter(name, {LAYER: factors}, new_config(None, rank=1, alpha=2, target_modules=[LAYER]))


def write_adapter(folder: Path, value: float) -> None:
    """Write PEFT's two files."""
    folder.mkdir(parents=True)
    for file, data in encode_adapter(adapter_of(folder.name, value)).items():
        (folder / file).write_bytes(data)


@dataclass(frozen=True)
class Operation:
    """Something that writes.

    Args:
        name: of it.
        work: does it, and gives back control after each step that it has acknowledged; done again, it changes nothing.
        look: what a reader sees; fails where it is not whole.
    """

    name: str
    work: Work
    look: Callable[[Path], State]


def library_state(place: Path) -> State:
    """A library as a reader sees it: None where there is none. All that is in it is held to its hashes."""
    path = place / "lib"
    if not (path / LIBRARY_FILE).exists():
        return None
    # A reader that looks twice and sees the same has seen one moment.
    before, state = None, None
    while True:
        library = Library.open(path)
        after = library.stamps(), library.default_router
        if after == before:
            return state
        before, state = after, _read_state(library)


def _read_state(library: Library) -> State:
    path = library.path
    if problems := library.verify():
        raise AssertionError(f"verify: {problems[0]}")
    rows, unread = library.listing()
    assert not unread, unread
    return {
        "router": json.dumps(library.default_router, sort_keys=True),
        "adapters": {row["name"]: row["hash"] for row in rows},
        "derived": {name: sha256(repr(sorted(files.items())).encode()) for name, files in read_derived_files(path)},
        "snapshots": {
            each.name: each.adapters for each in library.snapshots() if not each.name.startswith("before-rollback")
        },
        "results": {key: json.dumps(value) for key, value in stored_values(library)},
    }


def remote_state(place: Path) -> State:
    """A remote as somebody else sees it, all files held to their hashes; and the library, which must not change."""
    remote = open_remote(parse_place(str(place / "remote")))
    head = remote.head("main")
    there: Any = None
    if head is not None:
        entries = remote.entries(head.snapshot, None)
        for entry, files in entries.items():
            for file, record in files.items():
                read_whole(remote, head.snapshot, f"{entry}/{file}", record)
        there = {entry: {file: list(record) for file, record in files.items()} for entry, files in entries.items()}
    return {"library": library_state(place), "there": there}


def export_state(place: Path) -> State:
    """An export: None where there is none, else the adapters in it, which PEFT must be able to read."""
    out = place / "out"
    if not out.exists():
        return None
    names = sorted(folder.name for folder in out.iterdir())
    return {name: read_adapter(out / name, name).rank for name in names}


def make_place(place: Path, model: Any) -> None:
    """What the operations begin from: a library of two adapters, a remote with a newer one, folders to add."""
    library = Library.create(place / "lib", model, base_name="tiny")
    for name, value in (("a", 1.0), ("b", 2.0)):
        library.add_adapter(adapter_of(name, value), {"tasks": [name]})
    key = expert_key(library, "a")
    save_prepared(library, "centroid", key, Prepared({LAYER: torch.ones(HIDDEN)}, {"rows": 1}, {}))
    ResultCache(library, "base").put("old", [1])
    push_library(library.path, str(place / "theirs"), results=True)
    clone_library(str(place / "theirs"), place / "other")
    other = Library.open(place / "other")
    other.replace_adapter(adapter_of("b", 5.0), {"tasks": ["b"]})
    other.add_adapter(adapter_of("c", 6.0), {"tasks": ["c"]})
    save_prepared(other, "centroid", expert_key(other, "c"), Prepared({LAYER: torch.ones(HIDDEN)}, {"rows": 2}, {}))
    ResultCache(other, "base").put("new", [2])
    push_library(other.path, str(place / "theirs"), results=True)
    push_library(library.path, str(place / "remote"))
    library.replace_adapter(adapter_of("a", 7.0), {"tasks": ["a"]})
    library.snapshot("then")
    library.remove("a")
    library.set_default_router({**library.default_router, "top_k": 3})
    library.add_adapter(adapter_of("a", 8.0), {"tasks": ["a"]})
    library.add_adapter(adapter_of("d", 9.0), {"tasks": ["d"]})
    for name, value in (("n1", 11.0), ("n2", 12.0), ("n3", 13.0), ("replacement", 14.0)):
        write_adapter(place / name, value)


def operations(model: Any) -> list[Operation]:
    """All that writes to a library.

    Args:
        model: the base.
    """

    def opened(place: Path) -> Library:
        return Library.open(place / "lib")

    def create(place: Path) -> Iterator[None]:
        if not os.path.lexists(place / "lib" / LIBRARY_FILE):
            Library.create(place / "lib", model, base_name="tiny")
        yield

    def add(place: Path, *names: str) -> Iterator[None]:
        for name in names:
            library = opened(place)
            if name not in library:
                library.add(place / name)
            yield

    def remove(place: Path) -> Iterator[None]:
        if "b" in (library := opened(place)):
            library.remove("b")
        yield

    def replace(place: Path) -> Iterator[None]:
        opened(place).replace(place / "replacement", "b")
        yield

    def router(place: Path) -> Iterator[None]:
        library = opened(place)
        library.set_default_router({**library.default_router, "top_k": 2})
        yield

    def prepare(place: Path) -> Iterator[None]:
        library = opened(place)
        for rows in (3, 4):  # the second takes the place of the first
            prepared = Prepared({LAYER: torch.full((HIDDEN,), float(rows))}, {"rows": rows}, {})
            save_prepared(library, "centroid", expert_key(library, "b"), prepared)
            yield

    def results(place: Path) -> Iterator[None]:
        cache = ResultCache(opened(place), "base")
        for key in ("first", "second"):
            if cache.get(key) is None:
                cache.put(key, {"n": [1, 2, 3] * 50})
            yield

    def pull(place: Path) -> Iterator[None]:
        pull_library(place / "lib", str(place / "theirs"), results=True)
        yield

    def push(place: Path) -> Iterator[None]:
        push_library(place / "lib", str(place / "remote"), results=True)
        yield

    def push_anew(place: Path) -> Iterator[None]:
        push_library(place / "lib", str(place / "remote"))
        yield

    def clone(place: Path) -> Iterator[None]:
        if not os.path.lexists(place / "lib" / LIBRARY_FILE):
            clone_library(str(place / "theirs"), place / "lib", results=True)
        yield

    def export(place: Path) -> Iterator[None]:
        if not os.path.lexists(place / "out"):
            export_static(opened(place), place / "out", PEFT, StaticSettings(), "")
        yield

    def snapshot(place: Path) -> Iterator[None]:
        if "now" not in {each.name for each in opened(place).snapshots()}:
            opened(place).snapshot("now")
        yield

    def rollback(place: Path) -> Iterator[None]:
        opened(place).rollback("then")
        yield

    steps: Mapping[str, tuple[Work, Callable[[Path], State]]] = {
        "create": (create, library_state),
        "add": (lambda place: add(place, "n1"), library_state),
        "add several": (lambda place: add(place, "n1", "n2", "n3"), library_state),
        "remove": (remove, library_state),
        "replace": (replace, library_state),
        "router": (router, library_state),
        "prepare": (prepare, library_state),
        "results": (results, library_state),
        "pull": (pull, library_state),
        "push": (push, remote_state),
        "push anew": (push_anew, remote_state),
        "clone": (clone, library_state),
        "export": (export, export_state),
        "snapshot": (snapshot, library_state),
        "rollback": (rollback, library_state),
    }
    return [Operation(name, *step) for name, step in steps.items()]


# What must not be there when an operation begins, and what it needs beside the library.
ABSENT = {"create": "lib", "clone": "lib", "push anew": "remote"}
NEEDED = {
    "add": ("n1",), "add several": ("n1", "n2", "n3"), "replace": ("replacement",), "pull": ("theirs",),
    "clone": ("theirs",), "push": ("remote",),
}  # fmt: skip
