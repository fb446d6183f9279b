"""Merge methods beside uniform, base and oracle: scores and losses on held-in and held-out tasks.

    python benchmarks/merge.py LIBRARY TASKS [--held-in a,b] [--held-out c,d] [--rows 8] [--methods mean,tsv,...]
        [--scales 0.1,0.3,1,3] [--json]

All adapters of the library are merged by each method. The scale of each merge is the one of `--scales` with the lowest
mean loss on the first validation rows of the held-in tasks (the mean stays at 1: it is the router uniform, as one
adapter). Scores are means over tasks of the primary metric, with paired differences to uniform.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import lorary
from lorary.adapt.merge_library import MergedAdapter, merge_library
from lorary.adapt.merge_settings import MEAN, MERGES, MergeSettings
from lorary.data.schema import Task
from lorary.data.tasks import load_tasks
from lorary.data.template import make_template
from lorary.errors import LoraryError
from lorary.evaluate.cells import Cell
from lorary.evaluate.compare import Columns
from lorary.evaluate.evaluate_library import evaluate_library
from lorary.evaluate.loglik import answer_losses
from lorary.evaluate.settings import EvaluateSettings
from lorary.library.copying import copy_library
from lorary.library.opening import base_of, template_of
from lorary.library.store import Library
from lorary.model.base import Base, load_base

BESIDE = ("base", "uniform", "oracle")
LOSS = "loss"


def merges_of(library: Library, methods: Sequence[str]) -> tuple[dict[str, MergedAdapter], dict[str, float]]:
    """All merges by method, and the seconds that each took; a method that cannot merge these adapters is left out."""
    merges, seconds = {}, {}
    for method in methods:
        start = time.perf_counter()
        try:
            merges[method] = merge_library(library, MergeSettings(method), name=method)
        except LoraryError as error:
            print(f"left out: {method}: {error}", flush=True)
            continue
        seconds[method] = time.perf_counter() - start
        print(f"{method}: {seconds[method]:.1f} s, {merges[method].error:.1%} left out", flush=True)
    return merges, seconds


def library_of(library: Library, folder: Path, merges: Mapping[str, MergedAdapter], tasks: Sequence[str]) -> Library:
    """A library of the merges, for which those tasks are held in."""
    alone = copy_library(library, folder, (), {})
    for merged in merges.values():
        alone.add_adapter(merged.adapter, {**merged.provenance, "tasks": list(tasks)})
    return alone


def best_scales(
    base: Base, alone: Library, tasks: Mapping[str, Task], scales: Sequence[float], num_rows: int, template: str
) -> dict[str, float]:
    """The scale of each merge with the lowest mean loss on validation rows."""
    made = make_template(template, base.tokenizer, max_length=base.most_tokens(1024))
    rows = [made.encode(row.source, row.target) for task in tasks.values() for row in task.split("val")[:num_rows]]
    best = {}
    lorary.attach(base.model, alone, router="base", tokenizer=base.tokenizer)
    try:
        for method in alone.names():
            losses = {}
            for scale in scales if method != MEAN else (1.0,):
                with torch.no_grad(), lorary.routing(base.model, {"experts": {method: scale}}):
                    losses[scale] = sum(loss.mean for loss in answer_losses(base.model, rows)) / len(rows)
            best[method] = min(losses, key=lambda scale: losses[scale])
            print(f"{method}: " + ", ".join(f"{scale:g} {loss:.3f}" for scale, loss in losses.items()), flush=True)
    finally:
        lorary.detach(base.model)
    return best


def scaled(merged: MergedAdapter, scale: float) -> MergedAdapter:
    """The merge by a scale."""
    modules = {path: replace(factors, lora_b=factors.lora_b * scale) for path, factors in merged.adapter}
    return replace(merged, adapter=replace(merged.adapter, modules=modules, tensors={}))


def lines_of(cells: Mapping[str, Sequence[Cell]], groups: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """By way and group: mean score and loss, and the difference to uniform."""
    scores = Columns({way: {c.task: c.values for c in each if c.primary} for way, each in cells.items()})
    losses = {way: {c.task: c.value for c in each if c.metric == LOSS} for way, each in cells.items()}
    lines = []
    for way in cells:
        for group, names in groups.items():
            mean, difference = scores.mean(way, names), scores.difference(way, "uniform", names)
            lines.append({
                "way": way, "group": group, "score": mean.mean, "low": mean.low, "high": mean.high,
                "loss": sum(losses[way][name] for name in names) / len(names),
                "minus_uniform": difference.difference, "minus_low": difference.low, "minus_high": difference.high,
                "verdict": difference.verdict,
            })  # fmt: skip
    return lines


def table(lines: Sequence[Mapping[str, Any]], facts: Mapping[str, Mapping[str, float]], groups: Sequence[str]) -> str:
    """The lines as a Markdown table."""
    heads = ["merge", "scale", "rank", "left out", "s"]
    for group in groups:
        heads += [group, "minus uniform", "loss"]
    rows = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for way in dict.fromkeys(line["way"] for line in lines):
        own = facts.get(way)
        cells = (
            [f"`{way}`", f"{own['scale']:g}", f"{own['rank']:.0f}", f"{own['error']:.0%}", f"{own['seconds']:.1f}"]
            if own
            else [way, "", "", "", ""]
        )
        for line in (line for line in lines if line["way"] == way):
            gap = f"{line['minus_uniform']:+.3f} ({line['minus_low']:+.3f} to {line['minus_high']:+.3f})"
            cells += [f"{line['score']:.3f}", "" if way == "uniform" else gap, f"{line['loss']:.3f}"]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    """Merge, choose scales, and score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("LIBRARY")
    parser.add_argument("TASKS")
    parser.add_argument("--held-in", help="tasks of the library's experts; all of them by default")
    parser.add_argument("--held-out", default="", help="further tasks; none by default")
    parser.add_argument("--rows", type=int, default=8, help="test rows of each task")
    parser.add_argument("--scale-rows", type=int, default=2, help="validation rows of each task")
    parser.add_argument("--scales", default="0.1,0.3,1,3")
    parser.add_argument("--methods", default=",".join(MERGES))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    library = Library.open(options.LIBRARY)
    trained = sorted({task for name in library.names() for task in library.provenance(name)["tasks"]})
    groups = {"held-in": options.held_in.split(",") if options.held_in else trained}
    if options.held_out:
        groups["held-out"] = options.held_out.split(",")
    tasks = load_tasks(options.TASKS, names=[name for names in groups.values() for name in names])
    base, template = load_base(base_of(library, None)), template_of(library, None)
    merges, seconds = merges_of(library, options.methods.split(","))
    with TemporaryDirectory() as folder:
        alone = library_of(library, Path(folder) / "merges", merges, trained)
        held_in = {name: tasks[name] for name in groups["held-in"]}
        scales = [float(scale) for scale in options.scales.split(",")]
        best = best_scales(base, alone, held_in, scales, options.scale_rows, template)
        tuned = {method: scaled(merged, best[method]) for method, merged in merges.items()}
        alone = library_of(library, Path(folder) / "tuned", tuned, trained)
        settings = EvaluateSettings(routers=BESIDE, rows=options.rows, oracle_rows=4, routing_rows=0, template=template)
        beside = evaluate_library(base, library, tasks, settings)
        routers = tuple(f"experts[{method}]" for method in merges)
        merged = evaluate_library(base, alone, tasks, replace(settings, routers=routers))
    for evaluation in (beside, merged):
        evaluation.check()
    cells = {way: [cell for cell in beside.cells if cell.router == way] for way in BESIDE}
    cells |= {method: [cell for cell in merged.cells if cell.router == f"experts[{method}]"] for method in merges}
    lines = lines_of(cells, groups)
    facts = {
        method: {"scale": best[method], "rank": each.rank, "error": each.error, "seconds": seconds[method]}
        for method, each in merges.items()
    }
    if options.json:
        print(json.dumps({"rows": lines, "merges": facts}))
    else:
        print(table(lines, facts, list(groups)))


if __name__ == "__main__":
    main()
