"""The premise of clustering by models, tested: do adapters that look alike help each other's tasks?

    python benchmarks/premise.py TASKS --out FOLDER [--tasks a,b,c] [--seeds 0,1] [--inits shared,own] [--steps 40]

Each stage is kept in FOLDER, so that a run that was stopped goes on:
1. a library per training seed and initial draw (steps of 8 rows, upper 15 layers), and beside it the adapters at four
   moments of its training;
2. agreement of clusters with the tasks' families over five clustering seeds, beside clusters at random and of the
   tasks' texts, and the clusters of all moments against the reference recipe;
3. the loss of every expert of each first-seed library on 20 test rows of every task;
4. Spearman's correlation of similarity and transfer with Mantel's permutations of the tasks, and its picture.

TASKS is `builtin` or a folder with a manifest. The report goes to FOLDER/report.md, the picture beside it.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch
from mantel import mantel
from premise_page import scatter_svg, write_report
from torch import Tensor

import lorary
from lorary.adapter import Adapter, LoraFactors
from lorary.build.build_library import build_library
from lorary.build.settings import BuildSettings, RunSettings
from lorary.cluster.agreement import agreement
from lorary.cluster.baselines import family_labels, random_labels, text_labels
from lorary.cluster.mbc import Clustering, cluster_adapters
from lorary.data.encoder import embed_tasks
from lorary.data.packing import Group, MicroBatch, micro_batches
from lorary.data.schema import Task
from lorary.data.tasks import load_tasks
from lorary.data.template import make_template
from lorary.formats.peft import tensors_of
from lorary.formats.peft_config import new_config
from lorary.library.store import Library
from lorary.model.base import Base, load_base
from lorary.model.logits import target_losses
from lorary.train.callbacks import Callback

UPPER_LAYERS, EVALS, TEST_ROWS = 15, 4, 20
CLUSTER_SEEDS = range(5)
METHODS = ("delta", "paper-2024")
Row = dict[str, Any]


class KeepMoments(Callback):
    """Keeps the adapters of every evaluation but the first in a library of their own, as `TASK-STEP`."""

    def __init__(self, path: Path) -> None:
        self.library = Library.open(path) if path.exists() else Library.create(path, "embedded")

    def on_eval(
        self, name: str, step: int, loss: float, adapters: Callable[[], dict[str, dict[str, LoraFactors]]]
    ) -> None:
        """Store what a unit is by now."""
        moment = f"{name}-{step}"
        if step == 0 or moment in self.library:
            return
        ((_, modules),) = adapters().items()
        factors = next(iter(modules.values()))
        config = new_config(
            "embedded", rank=factors.rank, alpha=factors.scaling * factors.rank, target_modules=sorted(modules)
        )
        adapter = Adapter(moment, modules, config, tensors_of(modules))
        self.library.add_adapter(adapter, {"tasks": [name], "metrics": {"val_loss": loss}})


def train(
    base: Base, tasks: Mapping[str, Task], out: Path, seed: int, init: str, steps: int
) -> tuple[Library, Library]:
    """The library of one training seed and initial draw, and that of its moments."""
    path = out / f"{init}-{seed}"
    library = Library.open(path) if path.exists() else Library.create(path, "embedded")
    settings = BuildSettings(steps=steps, upper_layers=UPPER_LAYERS, val_rows=20, evals=EVALS, seed=seed, init=init)
    moments = KeepMoments(out / f"{init}-{seed}-moments")
    build_library(base, library, tasks, settings, run=RunSettings(window=13), callbacks=[moments])
    return library, moments.library


def agreement_rows(library: Library, families: Sequence[str], texts: Tensor, k: int) -> list[Row]:
    """Agreement of clusters with families, mean and deviation over the clustering seeds, for each way to cluster."""
    names = library.names()
    ways: dict[str, Callable[[int], Sequence[int]]] = {
        **{f"mbc {method}": _by_adapters(library, k, method) for method in METHODS},
        "random": lambda seed: random_labels(names, k, seed),
        "text": lambda seed: text_labels(texts, k, seed),
    }
    rows = []
    for way, labels_of in ways.items():
        labels = [labels_of(seed) for seed in CLUSTER_SEEDS]
        rows.append({"way": way, "k": k, **_scores(labels, families)})
    rows.append({"way": "family", "k": len(set(families)), **_scores([family_labels(families)], families)})
    return rows


def _by_adapters(library: Library, k: int, method: str) -> Callable[[int], Sequence[int]]:
    return lambda seed: cluster_adapters(library.names(), library.get, k=k, method=method, seed=seed).labels


def _scores(labels: Sequence[Sequence[int]], families: Sequence[str]) -> Row:
    truth = family_labels(families)
    found = [agreement(truth, own) for own in labels]
    rand, information = [one.adjusted_rand for one in found], [one.mutual_information for one in found]
    return {"ari": mean(rand), "ari_sd": pstdev(rand), "nmi": mean(information), "nmi_sd": pstdev(information)}


@contextmanager
def upper_layers(model: Any, first: int, hidden: Tensor) -> Iterator[None]:
    """Let a model start at a layer, from the hidden states that the layers below (no expert adapts them) gave."""
    trunk = model.model
    layers, embed = trunk.layers, trunk.embed_tokens.forward
    trunk.layers, trunk.embed_tokens.forward = layers[first:], lambda ids: hidden
    try:
        yield
    finally:
        trunk.layers, trunk.embed_tokens.forward = layers, embed


@torch.no_grad()
def losses_on(model: Any, batches: Sequence[MicroBatch], names: Sequence[str]) -> dict[str, float]:
    """Mean loss of the bare base (key '') and of every expert on the rows of a task, nats per target token."""
    first = len(model.model.layers) - UPPER_LAYERS
    sums = dict.fromkeys(("", *names), 0.0)
    for micro in batches:
        kept: list[Tensor] = []
        handle = model.model.layers[first].register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
        with lorary.routing(model, "base"):
            sums[""] += float(target_losses(model, micro.batch).double().sum())
        handle.remove()
        with upper_layers(model, first, kept[0]):
            for name in names:
                with lorary.routing(model, {"experts": [name]}):
                    sums[name] += float(target_losses(model, micro.batch).double().sum())
    num_targets = sum(len(micro.batch.labels) for micro in batches)
    return {name: total / num_targets for name, total in sums.items()}


def cross_losses(base: Base, library: Library, tasks: Mapping[str, Task], path: Path) -> dict[str, dict[str, float]]:
    """Loss of every expert on every task, kept in a file task by task."""
    lines = path.read_text().splitlines() if path.exists() else []
    known = {row["task"]: row["losses"] for row in map(json.loads, lines)}
    missing = [name for name in library if name not in known]
    if not missing:
        return known
    template = make_template("plain", base.tokenizer, max_length=base.most_tokens(2048))
    lorary.attach(base.model, library)
    try:
        for number, task in enumerate(missing):
            rows = [template.encode(row.source, row.target) for row in tasks[task].split("test")[:TEST_ROWS]]
            batches = micro_batches([Group(0, 0, rows, range(len(rows)))], 1024, share_prefix=True)
            known[task] = losses_on(base.model, batches, library.names())
            with path.open("a") as file:
                file.write(json.dumps({"task": task, "losses": known[task]}) + "\n")
            print(f"losses on {task}: {number + 1}/{len(missing)}", flush=True)
    finally:
        lorary.detach(base.model)
    return known


def transfer_of(losses: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> Tensor:
    """transfer(i, j): what expert i gains over the base on task j, in units of what j's own expert gains."""
    return torch.tensor(
        [[(losses[j][""] - losses[j][i]) / (losses[j][""] - losses[j][j]) for j in names] for i in names],
        dtype=torch.float64,
    )


def premise(library: Library, losses: Mapping[str, Mapping[str, float]], families: Mapping[str, str]) -> list[Row]:
    """The correlation of similarity and transfer by each method, plain, and with the family held constant."""
    names = [name for name in library if losses[name][name] < losses[name][""]]  # else transfer has no meaning
    strata = [families[name] for name in names]
    transfer = transfer_of(losses, names)
    rows = []
    for method in METHODS:
        similarity = _similarity(library, names, method)
        for held, found in {
            "nothing": mantel(similarity, transfer),
            "family": mantel(similarity, transfer, strata),
            "family, tasks exchanged within it": mantel(similarity, transfer, strata, within=True),
        }.items():
            rows.append({"method": method, "held": held, "tasks": len(names), "rho": found.rho, "p": found.p})
    return rows


def _similarity(library: Library, names: Sequence[str], method: str) -> Tensor:
    return cluster_adapters(names, library.get, k=2, method=method).similarity.double()


def all_moments(moments: Library, k: int) -> list[Row]:
    """Our clusters of the adapters of all moments beside the reference recipe's, seed by seed."""
    from cluster import reference_labels  # the benchmark next door: scikit-learn, step by step

    names = moments.names()
    rows = []
    for seed in CLUSTER_SEEDS:
        ours: Clustering = cluster_adapters(names, moments.get, k=k, method="paper-2024", seed=seed)
        theirs = reference_labels(moments, names, k, seed)
        moved = _moved(ours.labels, theirs, names)
        rows.append(
            {"seed": seed, "adapters": len(names), "ari": agreement(ours.labels, theirs).adjusted_rand, "moved": moved}
        )
    return rows


def _moved(ours: Sequence[int], theirs: Sequence[int], names: Sequence[str]) -> list[str]:
    """Adapters that are not in the cluster of theirs which most members of their own cluster are in."""
    most = {}
    for cluster in set(ours):
        found = [b for a, b in zip(ours, theirs, strict=True) if a == cluster]
        most[cluster] = max(set(found), key=found.count)
    return [name for name, a, b in zip(names, ours, theirs, strict=True) if most[a] != b]


def run(arguments: argparse.Namespace) -> Row:
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    names = arguments.tasks.split(",") if arguments.tasks else None
    tasks = {name: task for name, task in load_tasks(arguments.TASKS, names=names).items() if task.role == "train"}
    families = {name: str(task.family) for name, task in tasks.items()}
    base = load_base("embedded")
    texts = embed_tasks({name: tasks[name] for name in sorted(tasks)})
    found: Row = {"agreement": [], "premise": [], "moments": []}
    ordered = [families[name] for name in sorted(tasks)]
    for init in arguments.inits.split(","):
        for seed in map(int, arguments.seeds.split(",")):
            library, moments = train(base, tasks, out, seed, init, arguments.steps)
            for k in sorted({10, len(set(ordered))}):
                marks = {"init": init, "seed": seed}
                found["agreement"] += [{**marks, **row} for row in agreement_rows(library, ordered, texts, k)]
            if seed != int(arguments.seeds.split(",")[0]):
                continue
            found["moments"] += [{"init": init, **row} for row in all_moments(moments, 10)]
            losses = cross_losses(base, library, tasks, out / f"losses-{init}-{seed}.jsonl")
            found["premise"] += [{"init": init, **row} for row in premise(library, losses, families)]
            usable = [name for name in library if losses[name][name] < losses[name][""]]
            picture = scatter_svg(
                _similarity(library, usable, "delta"), transfer_of(losses, usable), [families[n] for n in usable]
            )
            (out / f"premise-{init}.svg").write_text(picture)
            found.setdefault("left_out", {})[init] = sorted(set(library.names()) - set(usable))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("TASKS", help="builtin, or a folder of tasks")
    parser.add_argument("--out", required=True)
    parser.add_argument("--tasks", help="names, separated by commas; all that may be trained on by default")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--inits", default="shared,own")
    parser.add_argument("--steps", type=int, default=40, help="of each expert, 8 rows each")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = run(arguments)
    (Path(arguments.out) / "result.json").write_text(json.dumps(found, indent=1))
    report = write_report(found)
    (Path(arguments.out) / "report.md").write_text(report)
    print(json.dumps(found) if arguments.json else report)


if __name__ == "__main__":
    main()
