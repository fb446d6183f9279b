"""How long a library of many adapters takes to list, filter, search and order, to find near adapters in, and to add to.

    python benchmarks/catalogue.py [--adapters 10000] [--repeats 5] [--json]

The base is a tiny random model; each adapter has rank 2 in one layer, and records of 1.6 kB with 20 losses. The library
is written to a temporary folder without forcing it to the disk, so files lie in the page cache. Times are the least of
the repeats, to which other work on the machine only adds: `time` is what passes, `processor time` what the process
takes of a core. `command` is a process of its own, from its start. Peers have no such command: there is no column of
theirs.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorary.adapter import Adapter, LoraFactors
from lorary.formats.peft import encode_adapter, parse_adapter
from lorary.formats.peft_config import new_config
from lorary.library.catalogue import select
from lorary.library.listing import list_library
from lorary.library.provenance import encode_provenance, new_provenance
from lorary.library.store import Library
from lorary.version import __version__

LAYER = "model.layers.0.self_attn.q_proj"
HIDDEN = 64


def adapter_of(name: str, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = LoraFactors(torch.randn(2, HIDDEN, generator=generator), torch.randn(HIDDEN, 2, generator=generator), 2.0)
    return Adapter(name, {LAYER: factors}, new_config(None, rank=2, alpha=4, target_modules=[LAYER]))


def library_of(folder: Path, number: int) -> Library:
    """A library of so many adapters, written at once."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=HIDDEN, intermediate_size=HIDDEN, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=2, vocab_size=300)  # fmt: skip
    library = Library.create(folder, LlamaForCausalLM(config), base_name="tiny")
    base = {"name": library.base.name, "fingerprint": library.base.fingerprint.digest}
    for position in range(number):
        name, task = f"adapter-{position:05}", f"task-{position % 100}"
        adapter = adapter_of(name, position)
        files = encode_adapter(adapter)
        losses = [[step, 2.0 / (1 + step)] for step in range(20)]
        details = {"tasks": [task], "method": "private", "metrics": {"train_losses": losses}, "tags": ["made"]}
        provenance = new_provenance(parse_adapter(name, files), files, base, details)
        place = folder / "adapters" / name
        place.mkdir(parents=True)
        for file, data in {**files, "provenance.json": encode_provenance(name, provenance)}.items():
            (place / file).write_bytes(data)
    return library


def timed(action: Callable[[int], object], repeats: int) -> tuple[float, float]:
    """Least time and processor time of an action that is told how often it ran before, in seconds."""
    walls, processors = [], []
    for number in range(repeats):
        began, used = time.perf_counter(), time.process_time()
        action(number)
        walls.append(time.perf_counter() - began)
        processors.append(time.process_time() - used)
    return min(walls), min(processors)


def commanded(arguments: Callable[[int], list[object]], repeats: int) -> tuple[float, float]:
    """As `timed`, of a process of its own."""
    walls, processors = [], []
    for number in range(repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.perf_counter()
        command = [sys.executable, "-m", "lorary", "library", *map(str, arguments(number))]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        walls.append(time.perf_counter() - began)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processors.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(walls), min(processors)


def measure(folder: Path, adapters: int, repeats: int) -> list[dict[str, Any]]:
    library = library_of(folder / "library", adapters)
    names = library.names()
    rows: list[dict[str, Any]] = []

    def add(case: str, times: tuple[float, float]) -> None:
        for figure, seconds in zip(("time", "processor time"), times, strict=True):
            rows.append({"case": case, "figure": figure, "unit": "s", "ours": round(seconds, 3), "better": "lower"})
        print(f"{case:<52}{times[0]:9.3f} s{times[1]:9.3f} s", file=sys.stderr)

    def listed(**options: Any) -> Callable[[int], object]:
        return lambda _: select(list_library(library.path)[0], **options)

    new = [folder / "new" / f"new-{number}" for number in range(3 * repeats)]
    for number, place in enumerate(new):
        place.mkdir(parents=True)
        for file, data in encode_adapter(adapter_of(place.name, adapters + number)).items():
            (place / file).write_bytes(data)

    add("list", timed(listed(), repeats))
    add("list those that fit a filter", timed(listed(filters=["task=task-7", "rank>=2"]), repeats))
    add("search for a text", timed(listed(search="adapter-00"), repeats))
    add("order by size", timed(listed(sort="size", is_reversed=True), repeats))
    add("add one (Library.add)", timed(lambda number: library.add(new[number]), repeats))
    add("nearest, the first time: all are read", timed(lambda _: library.nearest(names[0]), 1))
    add("nearest", timed(lambda number: library.nearest(names[number + 1]), repeats))
    add("compare one that was added with all",
        timed(lambda number: (library.add(new[repeats + number]), library.duplicates_of([new[repeats + number].name])),
              repeats))  # fmt: skip
    add("find all duplicates", timed(lambda _: library.duplicates(), 1))
    add("command: ls", commanded(lambda _: ["ls", library.path], repeats))
    add("command: nearest", commanded(lambda number: ["nearest", library.path, names[number]], repeats))
    add("command: add", commanded(lambda number: ["add", library.path, new[2 * repeats + number]], repeats))
    add("command: --help, which reads no library", commanded(lambda _: ["--help"], repeats))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), arguments.adapters, arguments.repeats)
    versions = {"lorary": __version__, "torch": torch.__version__}
    if arguments.json:
        print(json.dumps({"rows": rows, "machine": os.uname().machine, "versions": versions}))


if __name__ == "__main__":
    main()
