"""Time and memory of clustering a library by its weights, beside the paper's recipe in numpy and scikit-learn.

    python benchmarks/cluster.py [--large] [--sizes 100,1000] [--json]

Adapters are made: rank 4, the shapes of SmolLM2-135M, ten hidden groups that differ in their updates, one shared
initial draw. 100 and 1,000 of them (all linear layers, 5 MB each) are stored as a real library in the temporary folder
and removed afterwards; with `--large`, 10,000 more (query, key, value and output layers only) are made one at a time
while they are clustered, and are never on disk or in memory together.

Each contender runs in a process of its own. Time is from opening the library to the labels, reading included. Core
seconds are those of the whole process on all cores, imports included; they depend less on what else the machine does.
Memory is the peak of the whole process, interpreter and libraries included. The reference stacks all flattened factors
in one matrix, as the paper's recipe says. Errors of the sketch are those of its cosines against the exact ones.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch

import lorary
from lorary.adapter import Adapter, LoraFactors
from lorary.cluster.agreement import agreement
from lorary.cluster.mbc import cluster_adapters
from lorary.formats.peft import tensors_of
from lorary.formats.peft_config import new_config
from lorary.keys import keyed_generator

MIB = 2**20
GROUPS = 10
RANK = 4
LAYERS = 30
ATTENTION = {"q_proj": (576, 576), "k_proj": (576, 192), "v_proj": (576, 192), "o_proj": (576, 576)}
MLP = {"gate_proj": (576, 1536), "up_proj": (576, 1536), "down_proj": (1536, 576)}
METHODS = ("delta", "paper-2024", "sketch")
LARGE = 10_000


class Maker:
    """Makes adapters of ten groups: what a group shares is drawn once, what is an adapter's own at every call."""

    def __init__(self, blocks: tuple[str, ...]) -> None:
        leaves = {"self_attn": ATTENTION, "mlp": MLP}
        self.shapes = {
            f"model.layers.{layer}.{block}.{leaf}": shape
            for layer in range(LAYERS)
            for block in blocks
            for leaf, shape in leaves[block].items()
        }
        self.leaves = sorted({path.rsplit(".", 1)[-1] for path in self.shapes})
        self.draw = self._numbers("draw", 0)
        self.centres = [self._numbers("centre", group) for group in range(GROUPS)]
        self.seconds = 0.0

    def _numbers(self, kind: str, index: int) -> torch.Tensor:
        size = sum(RANK * (d_in + d_out) for d_in, d_out in self.shapes.values())
        return torch.randn(size, generator=keyed_generator("benchmark", kind, index))

    def __call__(self, name: str) -> Adapter:
        """The adapter of a name that ends in its number."""
        start = time.perf_counter()
        index = int(name.rsplit("-", 1)[-1])
        own, centre = self._numbers("own", index), self.centres[index % GROUPS]
        modules, offset = {}, 0
        for path, (d_in, d_out) in self.shapes.items():
            a = slice(offset, offset + RANK * d_in)
            b = slice(a.stop, a.stop + RANK * d_out)
            offset = b.stop
            lora_a = (self.draw[a] + 0.05 * centre[a] + 0.05 * own[a]).view(RANK, d_in) / d_in**0.5
            lora_b = 0.01 * (centre[b] + 2 * own[b]).view(d_out, RANK)
            modules[path] = LoraFactors(lora_a, lora_b, 4.0)
        config = new_config("embedded", rank=RANK, alpha=4.0 * RANK, target_modules=self.leaves)
        self.seconds += time.perf_counter() - start
        return Adapter(name, modules, config)


def reference_labels(library: lorary.Library, names: list[str], k: int, seed: int) -> list[int]:
    """The paper's recipe, written down with numpy and scikit-learn."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.metrics.pairwise import cosine_similarity

    rows = None
    for row, name in enumerate(names):
        adapter = library.get(name)
        flat = np.concatenate([t.numpy().ravel() for _, f in adapter for t in (f.lora_a, f.lora_b)])
        flat[np.abs(flat) <= np.quantile(np.abs(flat), 0.5)] = 0.0
        rows = np.empty((len(names), flat.size), np.float32) if rows is None else rows
        rows[row] = flat
    svd = TruncatedSVD(64, algorithm="randomized", n_iter=5, n_oversamples=10, random_state=seed)
    points = svd.fit_transform(rows)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    kmeans = KMeans(k, init="k-means++", n_init=10, random_state=seed)
    return [int(label) for label in kmeans.fit_predict(cosine_similarity(points))]


def run_contender(contender: str, folder: Path, size: int) -> dict[str, Any]:
    """Cluster with one contender in this process."""
    names = [f"made-{index:05d}" for index in range(size)]
    start = time.perf_counter()
    if contender == "reference":
        labels = reference_labels(lorary.Library.open(folder / "library"), names, GROUPS, 42)
        return {"labels": labels, **measured(start)}
    maker = Maker(("self_attn",)) if size == LARGE else None
    load: Callable[[str], Adapter] = maker or lorary.Library.open(folder / "library").get
    found = cluster_adapters(names, load, k=GROUPS, method=contender)
    made = {} if maker is None else {"making": maker.seconds}
    result = {"labels": list(found.labels), **made, **measured(start)}
    if size < LARGE:
        np.save(folder / f"{contender}.npy", found.similarity.numpy())
    return result


def measured(start: float) -> dict[str, float]:
    """Seconds since the start, seconds of all cores, and the peak of this process in bytes."""
    usage = resource.getrusage(resource.RUSAGE_SELF)  # its ru_maxrss would be at least what the parent held
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return {
        "seconds": time.perf_counter() - start,
        "core_seconds": usage.ru_utime + usage.ru_stime,
        "peak": peak * 1024.0,
    }


def in_process(contender: str, folder: Path, size: int) -> dict[str, Any]:
    """Run one contender in a process of its own."""
    print(f"measuring {contender} over {size} adapters ...", file=sys.stderr)
    command = [sys.executable, __file__, "--contender", contender, "--folder", str(folder), "--sizes", str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{contender} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def store(folder: Path, size: int) -> None:
    """Write the library of made adapters."""
    print(f"making {size} adapters ...", file=sys.stderr)
    maker = Maker(("self_attn", "mlp"))
    library = lorary.Library.create(folder / "library", base="embedded")
    for index in range(size):
        adapter = maker(f"made-{index:05d}")
        stored = Adapter(adapter.name, adapter.modules, adapter.config, tensors_of(adapter.modules))
        library.add_adapter(stored, {"tasks": []})


def rows_of_size(size: int) -> list[dict[str, Any]]:
    """The rows of one library on disk."""
    with tempfile.TemporaryDirectory(prefix="lorary-benchmark-") as name:
        folder = Path(name)
        store(folder, size)
        results = {contender: in_process(contender, folder, size) for contender in (*METHODS, "reference")}
        errors = np.load(folder / "sketch.npy").astype(np.float64) - np.load(folder / "delta.npy")
    case, peer = f"cluster-{size}", results["reference"]
    truth = [index % GROUPS for index in range(size)]
    rows = []
    for method in METHODS:
        own = results[method]
        rows += [
            harness.row(case, f"time ({method})", "s", "lower", ours=own["seconds"], peer=peer["seconds"]),
            harness.row(
                case, f"core seconds ({method})", "s", "lower", ours=own["core_seconds"], peer=peer["core_seconds"]
            ),
            harness.row(
                case, f"peak memory ({method})", "MiB", "lower", ours=own["peak"] / MIB, peer=peer["peak"] / MIB
            ),
            recovered(case, method, own["labels"], truth, peer["labels"]),
        ]
    same = agreement(results["paper-2024"]["labels"], peer["labels"]).adjusted_rand
    rms = float(np.sqrt((errors**2).sum() / (size * (size - 1))))
    rows += [
        harness.row(case, "agreement with the recipe (ARI)", "", "higher", ours=same),
        harness.row(case, "error of sketched cosines, rms", "", "lower", ours=rms),
        harness.row(case, "error of sketched cosines, max", "", "lower", ours=float(np.abs(errors).max())),
    ]
    return rows


def recovered(
    case: str, method: str, labels: list[int], truth: list[int], peer: list[int] | None = None
) -> dict[str, Any]:
    """How well the hidden groups were found."""
    theirs = None if peer is None else agreement(peer, truth).adjusted_rand
    ours = agreement(labels, truth).adjusted_rand
    return harness.row(case, f"groups found, ARI ({method})", "", "higher", ours=ours, peer=theirs)


def large_rows() -> list[dict[str, Any]]:
    """The rows of the adapters that are made on the fly."""
    case, own = f"cluster-{LARGE}", in_process("sketch", Path(), LARGE)
    return [
        harness.row(case, "time (sketch)", "s", "lower", ours=own["seconds"]),
        harness.row(case, "core seconds (sketch)", "s", "lower", ours=own["core_seconds"]),
        harness.row(case, "of the time: making adapters", "s", "lower", ours=own["making"]),
        harness.row(case, "peak memory (sketch)", "MiB", "lower", ours=own["peak"] / MIB),
        recovered(case, "sketch", own["labels"], [index % GROUPS for index in range(LARGE)]),
    ]


def main() -> None:
    """Measure each contender in its own process, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="100,1000", help="numbers of adapters in the libraries on disk")
    parser.add_argument("--large", action="store_true", help="also 10,000 adapters, made on the fly")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",") if size]
    if options.contender:
        print(json.dumps(run_contender(options.contender, options.folder, sizes[0])))
        return
    rows = [row for size in sizes for row in rows_of_size(size)]
    harness.report(rows + (large_rows() if options.large else []), options.json)


if __name__ == "__main__":
    main()
