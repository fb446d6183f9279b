"""Whole trees to damage, and what reads them: each reader returns, or raises an error of Lorary's that names the file.

A tree is damaged by `fuzz_files`. What a reader took in spite of the damage is compared with the bytes in the file by a
second, simple reader of safetensors here: a number from another place than the header says is a finding, too.
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fuzz_files import WEIGHTS, Case, Tree, damage_document, draw_case, encode, sha256, split_safetensors, write_tree
from transformers import LlamaConfig, LlamaForCausalLM

from lorary.adapter import Adapter, LoraFactors
from lorary.build.jobs import read_overrides
from lorary.data.tasks import load_tasks
from lorary.evaluate.cache import stored_values
from lorary.evaluate.prompts import read_prompts
from lorary.formats.checkpoint import check_layers, read_config, weight_files
from lorary.formats.peft import encode_adapter, read_adapter, read_shapes
from lorary.formats.peft_config import new_config
from lorary.formats.quiet import quiet_transformers
from lorary.library.assignment import Assignment, find_assignment, save_assignment
from lorary.library.clusters import cluster_library, stored_clusters
from lorary.library.fingerprint_folder import fingerprint_of_folder
from lorary.library.listing import list_library
from lorary.library.opening import template_of
from lorary.library.prepared import Prepared, expert_key, load_prepared, save_prepared
from lorary.library.sources import adapter_folders
from lorary.library.store import Library
from lorary.model.attach import attach
from lorary.model.save import load, save
from lorary.remote.clone import clone_library
from lorary.remote.pull import pull_library
from lorary.remote.results import read_results
from lorary.remote.scan import scan
from lorary.serve.decision_log import read_log
from lorary.serve.routed_layout import read_layout
from lorary.study.parse import read_study

CONFIG, PROVENANCE = "adapter_config.json", "provenance.json"
PATHS = tuple(f"model.layers.{layer}.self_attn.q_proj" for layer in range(2))
HIDDEN = 32
# Of the adapters.
NAMES = ("one", "two", "new")
# Name of what is called, and the call.
Call = tuple[str, Callable[[], object]]


class WrongError(Exception):
    """What was taken in is not what the file says."""


@dataclass(frozen=True)
class Whole:
    """Trees without damage, by kind; `library` and `base` lie on the disk, too.

    Args:
        trees: by kind.
        folder: holds `library` and `base`.
    """

    trees: Mapping[str, Tree]
    folder: Path


def tiny_base() -> Any:
    """A random Llama of some ten thousand weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                        num_key_value_heads=2, vocab_size=64, eos_token_id=0, bos_token_id=None, pad_token_id=0)
        )  # fmt: skip


def adapter_of(name: str, seed: int, **config: Any) -> Adapter:
    """An adapter of rank 2 for the tiny base."""
    generator = torch.Generator().manual_seed(seed)
    modules = {
        path: LoraFactors(torch.randn(2, HIDDEN, generator=generator), torch.randn(HIDDEN, 2, generator=generator), 2.0)
        for path in PATHS
    }
    fields = new_config(None, rank=2, alpha=4, target_modules=["q_proj"])
    return Adapter(name, modules, {**fields, **config})


def read_tree(folder: Path) -> Tree:
    """All files of a folder that a reader looks at."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith(".lock"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def make_whole(folder: Path) -> Whole:
    """Make each kind of tree once."""
    model = tiny_base()
    with quiet_transformers():
        model.save_pretrained(folder / "base")
    library = Library.create(folder / "library", model, base_name=str(folder / "base"))
    for seed, name in enumerate(("one", "two")):
        library.add_adapter(adapter_of(name, seed), {"tasks": [name], "families": {name: "f"}, "template": "plain"})
    cluster_library(library, k=2)
    for name in library:
        save_prepared(
            library, "centroid", expert_key(library, name), Prepared({PATHS[0]: torch.ones(4)}, {"rows": 1}, {})
        )
    skills = {name: library.provenance(name)["content_hash"] for name in library}
    logits = {path: torch.zeros(1, 1, 2) for path in PATHS}
    save_assignment(library, Assignment(("task",), skills, logits), {"steps": 1})
    (library.path / "results").mkdir()
    lines = (json.dumps({"key": sha256(b"%d" % n), "value": [n / 7, {"losses": [n]}]}) for n in range(3))
    (library.path / "results" / "evaluation.jsonl").write_text("\n".join(lines) + "\n")
    save(attach(model, library, router="uniform"), folder / "saved")
    files = encode_adapter(adapter_of("new", 5))
    patterned = encode_adapter(
        adapter_of("new", 6, rank_pattern={"layers.0.self_attn.q_proj": 2, ".*q_proj": 2}, layers_pattern="layers",
                   alpha_pattern={r"^model\.layers\.1\..*": 4}, layers_to_transform=[0, 1], exclude_modules=["k_proj"])
    )  # fmt: skip
    layout = {"format_version": 1, "router": "arrow", "top_k": 1, "temperature": 1.0, "experts": ["a"], "ranks": [2],
              "content_hash": "0" * 64}  # fmt: skip
    beside = {PROVENANCE: (library.path / "adapters" / "one" / PROVENANCE).read_bytes()}
    trees: dict[str, Tree] = {
        "adapter": {**files}, "patterns": {**patterned}, "copied": {**read_tree(library.path / "adapters" / "one")},
        "routed": {**files, "lorary_routing.json": encode(layout)},
        "library": read_tree(library.path), "base": read_tree(folder / "base"), "saved": read_tree(folder / "saved"),
        **_rows(),
    }  # fmt: skip
    trees["copied"].update(beside)
    seal_library(trees["library"])
    trees["remote"] = as_remote(trees["library"], random.Random(0))
    return Whole(trees, folder)


def _rows() -> dict[str, Tree]:
    rows: list[dict[str, Any]] = [
        {"task": f"t{n % 2}", "split": ("train", "val", "test")[n % 3], "source": f"ask {n}", "target": f"say {n}",
         "family": "f", "options": [f"say {n}", "no"], "extra": {"n": n, "deep": [{"a": 1.5}]}} for n in range(6)
    ]  # fmt: skip
    plain = [{"prompt": f"ask {n}", "completion": f"say {n}"} for n in range(6)]
    chat = [
        {"messages": [{"role": "user", "content": f"ask {n}"}, {"role": "assistant", "content": "yes"}]}
        for n in range(6)
    ]
    manifest = {"tasks": [{"task": "t0", "file": "t.jsonl", "family": "f", "role": "train", "metric": "em"},
                          {"task": "t1", "file": "t.jsonl", "family": "f"}]}  # fmt: skip

    def lines(values: list[Any]) -> bytes:
        return b"\n".join(json.dumps(value).encode() for value in values) + b"\n"

    table = b"source,target\n" + b"".join(b'ask %d,"say, %d"\n' % (n, n) for n in range(6))
    readme = b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*.csv\n---\n# x\n"
    overrides = {"t0": {"rank": 4, "alpha": 8.0, "target_modules": ["q_proj"]}}
    study = (
        b"about: a study\nbase: embedded\ntasks:\n  train: {reference: builtin}\ntrain: {rank: 4, steps: 3}\nstages:\n"
        b"- build: lib\n  method: private\n- evaluate: scores\n  libraries: [lib]\n  routers: [arrow]\n  held_in: 8\n"
    )
    entry = dict.fromkeys(("id", "time", "endpoint", "model", "router", "sentence", "is_fallback", "experts"), 1)
    log = lines([{"kind": "decision", **entry}] * 3)
    return {
        "rows.jsonl": {"x.jsonl": lines(rows)}, "plain.jsonl": {"x.jsonl": lines(plain)},
        "chat.jsonl": {"x.jsonl": lines(chat)}, "rows.csv": {"x.csv": table},
        "rows.tsv": {"x.tsv": table.replace(b",", b"\t")}, "rows.json": {"x.json": json.dumps(plain).encode()},
        "columns.json": {"x.json": json.dumps({"prompt": ["a", "b"], "completion": ["c", "d"]}).encode()},
        "manifest": {"d/manifest.json": json.dumps(manifest).encode(), "d/t.jsonl": lines(rows)},
        "data set": {"d/README.md": readme, "d/data/a.csv": table},
        "split names": {"d/train.json": json.dumps(plain).encode(), "d/test.json": json.dumps(plain[:2]).encode()},
        "prompts": {"prompts.jsonl": lines([{"prompt": "a", "answer": "b"}] * 2)},
        "overrides": {"overrides.json": json.dumps(overrides).encode()}, "study": {"study.yaml": study},
        "log": {"log.jsonl": log}, **_tables(plain),
    }  # fmt: skip


def _tables(rows: list[dict[str, str]]) -> dict[str, Tree]:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(rows)
    parquet, stream, file = io.BytesIO(), io.BytesIO(), io.BytesIO()
    pq.write_table(table, parquet)
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return {
        "rows.parquet": {"x.parquet": parquet.getvalue()}, "stream.arrow": {"x.arrow": stream.getvalue()},
        "file.arrow": {"x.arrow": file.getvalue()},
    }  # fmt: skip


# Hashes that a tree holds of itself, computed anew: a stranger would do so.


def seal_library(tree: Tree) -> None:
    """The digest in library.json, the hashes in provenances and in derived documents."""
    for path, node in list(tree.items()):
        above, _, name = path.rpartition("/")
        if not isinstance(node, bytes):
            continue
        if path == "library.json":
            document = json.loads(node)
            mark = document["base"]["fingerprint"]
            values = {key: list(map(float, entries)) for key, entries in mark["samples"].items()}
            text = json.dumps([mark["architecture"], mark["shapes"], values], sort_keys=True, separators=(",", ":"))
            mark["digest"] = sha256(text.encode())
            tree[path] = json.dumps(document).encode()
        elif name in (PROVENANCE, "entry.json"):
            document = json.loads(node)
            others = {
                file.removeprefix(f"{above}/"): data for file, data in tree.items() if file.startswith(f"{above}/")
            }
            document["files"] = {
                file: sha256(data) for file, data in others.items() if isinstance(data, bytes) and file != name
            }
            tree[path] = json.dumps(document).encode()


def as_remote(files: Tree, rng: random.Random, which: str = "none") -> Tree:
    """The objects of a remote that holds a library, with a damaged page, index or ref where asked; hashes are right."""
    objects: Tree = {}

    def put(data: bytes) -> tuple[str, int]:
        objects[f"objects/{sha256(data)}"] = data
        return sha256(data), len(data)

    entries: dict[str, dict[str, Any]] = {}
    for path, node in files.items():
        above, _, name = path.rpartition("/")
        if isinstance(node, bytes) and not path.startswith("."):
            entries.setdefault(above or "library", {})[name] = list(put(node))

    def written(place: str, document: Any) -> bytes:
        return damage_document(document, rng)[0] if place == which else encode(document)

    page = put(written("page", {"entries": entries}))
    index = put(written("index", {"format_version": 1, "pages": {"": list(page)}}))
    objects["refs/main"] = written("ref", {"format_version": 1, "snapshot": index[0]})
    return objects


KINDS: Mapping[str, int] = {
    "adapter": 64, "patterns": 40, "copied": 14, "routed": 4, "library": 22, "remote": 8, "base": 4, "saved": 1,
    "rows.jsonl": 6, "plain.jsonl": 4, "chat.jsonl": 4, "rows.csv": 4, "rows.tsv": 2, "rows.json": 2, "columns.json": 2,
    "manifest": 4, "data set": 4, "split names": 2, "rows.parquet": 4, "stream.arrow": 2, "file.arrow": 2, "prompts": 2,
    "overrides": 2, "study": 4, "log": 2,
}  # fmt: skip


def draw(whole: Whole, rng: random.Random, kind: str | None = None) -> Case:
    """A case of a kind, or of any."""
    kind = kind or rng.choices(list(KINDS), list(KINDS.values()))[0]
    if kind != "remote":
        seal = seal_library if kind == "library" else None
        return draw_case(kind, whole.trees[kind], rng, seal)
    case = draw_case(kind, whole.trees["library"], rng, seal_library) if rng.random() < 0.4 else None
    if case is not None:
        return Case(kind, as_remote(case.tree, rng), case.damages)
    if rng.random() < 0.4:
        return draw_case(kind, whole.trees["remote"], rng)
    which = rng.choice(("page", "page", "index", "ref"))
    return Case(kind, as_remote(whole.trees["library"], rng, which), [f"the {which}"])


# What reads them.


class Readers:
    """Calls for cases, in a place of their own.

    Args:
        whole: trees without damage.
        place: a folder for cases and for libraries that they go into.
    """

    def __init__(self, whole: Whole, place: Path) -> None:
        self._place = place
        self._copy = place / "library"
        shutil.copytree(whole.folder / "library", self._copy)

    def write(self, case: Case) -> Path:
        """The folder of a case."""
        folder = self._place / "case"
        shutil.rmtree(folder, ignore_errors=True)
        write_tree(case.tree, folder / "new")
        return folder / "new"

    def calls(self, case: Case, folder: Path) -> Iterator[Call]:
        """All that reads a case."""
        if case.kind in ("adapter", "patterns", "copied", "routed"):
            yield from self._of_adapter(folder, len(case.damages[0]))
        elif case.kind == "library":
            yield from self._of_library(folder, case)
        elif case.kind == "remote":
            yield from self._of_remote(folder)
        elif case.kind == "base":
            label = str(folder)
            yield "read_config", lambda: check_layers(read_config(folder, label), weight_files(folder, label), label)
            if case.damages[0].startswith("config"):
                yield "fingerprint_of_folder", lambda: fingerprint_of_folder(folder)
        elif case.kind == "saved":
            yield "load", lambda: load(folder)
        elif case.kind == "prompts":
            yield "read_prompts", lambda: read_prompts(str(folder / "prompts.jsonl"))
        elif case.kind == "overrides":
            yield "read_overrides", lambda: read_overrides(folder / "overrides.json")
        elif case.kind == "study":
            yield "read_study", lambda: read_study(str(folder / "study.yaml"))
        elif case.kind == "log":
            yield "read_log", lambda: list(read_log(folder / "log.jsonl"))
        else:
            paths = sorted(folder.iterdir()) if folder.is_dir() else []
            for path in paths[:2]:
                yield "load_tasks", lambda path=path: load_tasks(path)  # type: ignore[misc]

    def _of_adapter(self, folder: Path, number: int) -> Iterator[Call]:
        yield "read_adapter", lambda: _checked(read_adapter(folder), folder)
        yield "read_shapes", lambda: read_shapes(folder, "new")
        yield "read_layout", lambda: read_layout(folder)
        yield "adapter_folders", lambda: adapter_folders([str(folder)])

        def add() -> None:
            library = Library.open(self._copy)
            try:
                library.add(folder, "new")
                _checked(library.get("new"), folder)
                library.provenance("new")
            finally:
                if "new" in library:
                    library.remove("new")

        # Which takes as long as all others; what is refused above is refused there by the same lines.
        if number % 3 == 0:
            yield "Library.add", add

    def _of_library(self, folder: Path, case: Case) -> Iterator[Call]:
        yield "list_library", lambda: list_library(folder)
        opened: list[Library] = []
        yield "Library.open", lambda: opened.append(Library.open(folder))
        if not opened:
            return
        library = opened[0]
        names: list[str] = []
        yield "names", lambda: names.extend(library.names())
        yield "listing", lambda: library.listing()
        clean: list[bool] = []
        yield "verify", lambda: clean.append(not library.verify())
        for name in names[:1]:
            yield "get", lambda name=name: _checked(library.get(name), folder / "adapters" / name)  # type: ignore[misc]
            yield "shapes", lambda name=name: library.shapes(name)  # type: ignore[misc]
            yield "expert", lambda name=name: repr(library[name])  # type: ignore[misc]
            yield "load_prepared", lambda name=name: load_prepared(library, "centroid", expert_key(library, name))  # type: ignore[misc]
        yield "repr", lambda: (repr(library), library._repr_html_())
        yield "template_of", lambda: template_of(library, None)
        yield "stored_clusters", lambda: _used(stored_clusters(library))
        yield "find_assignment", lambda: find_assignment(library)
        yield "stored_values", lambda: sum(1 for _ in stored_values(library))
        yield "read_results", lambda: read_results(library.path)
        yield "scan", lambda: scan(library, results=True)
        if case.must_refuse and clean == [True] and case.where.startswith("adapters/"):
            raise WrongError(f"verify finds nothing wrong with {case.damages[0]}")

    def _of_remote(self, folder: Path) -> Iterator[Call]:
        clone = folder.parent / "clone"

        def cloned() -> None:
            clone_library(str(folder), clone, results=True)
            library = Library.open(clone)
            if problems := library.verify():
                raise WrongError(f"cloned, and then {problems[0]}")
            for name in library:
                _checked(library.get(name), clone / "adapters" / name)

        yield "clone", cloned
        copy = folder.parent / "library"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self._copy, copy)
        yield "pull", lambda: pull_library(copy, str(folder), results=True, overwrite=True)
        yield "verify", lambda: _whole(Library.open(copy))


def check_readers(whole: Whole, place: Path) -> None:
    """Check that whole trees are read: an error of a damaged one is one of the damage then."""
    readers = Readers(whole, place)
    for kind, tree in whole.trees.items():
        case = Case(kind, tree, ["config"])
        for name, call in readers.calls(case, readers.write(case)):
            try:
                call()
            except Exception as error:
                raise SystemExit(f"{name} must read a whole {kind}: {error}") from error


def _whole(library: Library) -> None:
    if problems := library.verify():
        raise WrongError(f"pulled, and then {problems[0]}")


def _used(result: Any) -> None:
    """All that clusters are asked for."""
    if result is not None:
        result.tables(), result.records(), json.dumps(result.to_json())


def _checked(adapter: Adapter, folder: Path) -> None:
    """Compare an adapter with its file, read by the letter of the format.

    Raises:
        WrongError: if a tensor is not what stands at the place that the header gives.
    """
    data = (folder / WEIGHTS).read_bytes()
    pairs: list[list[tuple[str, Any]]] = []
    size = int.from_bytes(data[:8], "little")
    json.loads(data[8 : 8 + size], object_pairs_hook=lambda found: pairs.append(found) or dict(found))
    if any(len(dict(each)) < len(each) for each in pairs):
        raise WrongError("a key of the header stands in it twice")
    header, body = split_safetensors(data)
    header.pop("__metadata__", None)
    if set(header) != set(adapter.tensors):
        raise WrongError(f"tensors {sorted(set(header) ^ set(adapter.tensors))[:3]}")
    spans = sorted(tuple(entry["data_offsets"]) for entry in header.values())
    ends = [0, *(end for _, end in spans)]
    if [begin for begin, _ in spans] != ends[:-1] or ends[-1] != len(body):
        raise WrongError(f"spans {spans[:5]} of {len(body)} bytes")
    for key, entry in header.items():
        tensor = adapter.tensors[key].contiguous()
        begin, end = entry["data_offsets"]
        actual = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        if actual != body[begin:end] or list(tensor.shape) != entry["shape"]:
            raise WrongError(f"{key}: not the bytes of its place")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise WrongError(f"{key}: not finite")
    with open(folder / CONFIG, "rb") as file:
        config = json.load(file)
    for factors in adapter.modules.values():
        if not abs(factors.scaling) < float("inf"):
            raise WrongError(f"scaling {factors.scaling} of {config}")


def quiet_place() -> Path | None:
    """A folder in memory, where there is one: nothing is written to a disk a hundred thousand times."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and os.access(shared, os.W_OK) else None


__all__ = [
    "KINDS",
    "NAMES",
    "Case",
    "Readers",
    "Whole",
    "WrongError",
    "check_readers",
    "draw",
    "make_whole",
    "quiet_place",
]
