"""`lorary reproduce --dry-run`: what a study takes, worked out offline from configurations. Nothing is written.

What is not on this machine (a base, a set of tasks) is taken as the study's `assume` says, and said to be assumed.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorary.build.settings import BuildSettings
from lorary.data.schema import SPLITS, Task
from lorary.data.tasks import BUILTIN
from lorary.errors import TaskError, UsageError
from lorary.study.config import AdaptStage, BuildStage, DriftStage, EvaluateStage, Stage, TaskSet, identity
from lorary.study.context import StudyContext
from lorary.study.skeleton import BaseSkeleton, skeleton_for

# Parameters, gradient, two moments and the best parameters of an expert in training, float32.
EXPERT_BYTES = 5 * 4
# Values that the backward pass keeps per token, layer and unit of width, about.
ACTIVATIONS = 17
# What training reaches of the speed of one large product of matrices.
EFFICIENCY = 0.6
# Characters of a token, about: rows of a task are counted, not encoded.
CHARACTERS = 4.0


@dataclass(frozen=True)
class RowCounts:
    """Rows of one task, as far as a dry run needs them.

    Args:
        train: training rows.
        val: validation rows.
        test: test rows.
        tokens: of a row with its answer, on average.
        options: answers to rank in a row; 1 where one is generated.
    """

    train: int
    val: int
    test: int
    tokens: float
    options: float


def dry_run(context: StudyContext, stages: Sequence[Stage]) -> dict[str, Any]:
    """Check a study against its base and estimate every stage.

    Returns:
        `stages` (one row each), `totals`, `base` and `assumed`, as values of JSON.

    Raises:
        BaseModelError: if the base is neither here nor described.
        UsageError: if a target module is not in it, or tasks are neither here nor described.
    """
    assume = context.study.assume
    notes: list[str] = []
    train = _sizes(context, context.study.train, notes)
    held_out: dict[str, RowCounts] = {}
    for chosen in context.study.held_out:
        held_out |= _sizes(context, chosen, notes)
    skeleton = skeleton_for(context.study.base, assume.get("model"))
    if skeleton.is_assumed:
        notes.append(f"the base {context.study.base} is not looked up: its configuration is what the study says")
    speed = assume.get("tflops", 0.0) * 1e12
    if not speed:
        speed = _speed_here()
        notes.append(f"speed: {speed / 1e9:.0f} GFLOP/s, {EFFICIENCY:.0%} of what one product of matrices reached here")
    else:
        notes.append(f"speed: {assume['tflops']:g} TFLOP/s of training are assumed, not measured")
    rows = [_row(stage, skeleton, train, held_out, speed, context) for stage in stages]
    notes.append("tokens: rows are counted in characters, four to a token, unless assumed; clusters of equal sizes")
    return {
        "study": context.study.name,
        "base": {"name": context.study.base, "architecture": type(skeleton.model).__name__, "layers": skeleton.layers,
                 "parameters": skeleton.parameters, "assumed": skeleton.is_assumed},
        "tasks": {"train": len(train), "held_out": len(held_out)},
        "stages": rows,
        "totals": {key: sum(row[key] for row in rows) for key in ("steps", "tokens", "disk_bytes", "seconds")}
        | {"memory_bytes": max((row["memory_bytes"] for row in rows), default=0)},
        "assumed": notes,
    }  # fmt: skip


def dry_run_text(document: Mapping[str, Any]) -> str:
    """A dry run for a reader."""
    base, totals = document["base"], document["totals"]
    lines = [
        f"study {document['study']}: {document['tasks']['train']} tasks to train on, "
        f"{document['tasks']['held_out']} held out",
        f"base {base['name']}: {base['architecture']}, {base['layers']} layers, {base['parameters']:,} parameters",
        f"{'stage':<32} {'experts':>7} {'parameters':>14} {'steps':>9} {'tokens':>15} {'memory':>9} {'hours':>8}",
    ]
    for row in document["stages"]:
        lines.append(
            f"{row['stage']:<32} {row['experts']:>7} {row['parameters']:>14,} {row['steps']:>9,} {row['tokens']:>15,} "
            f"{row['memory_bytes'] / 2**30:>7.1f} G {row['seconds'] / 3600:>8.2f}"
        )
    lines += [
        f"in all: {totals['steps']:,} steps, {totals['tokens']:,} tokens, {totals['disk_bytes'] / 2**30:.2f} GiB on "
        f"disk, {totals['memory_bytes'] / 2**30:.1f} GiB of memory, about {totals['seconds'] / 3600:.1f} hours",
        *(f"assumed: {note}" for note in document["assumed"]),
    ]
    return "\n".join(lines)


def _speed_here() -> float:
    """FLOP/s that training may reach on this machine as it is now."""
    size, best = 768, float("inf")
    matrix = torch.ones(size, size)
    for _ in range(5):
        started = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - started)
    return EFFICIENCY * 2 * size**3 / best


def _sizes(context: StudyContext, chosen: TaskSet, notes: list[str]) -> dict[str, RowCounts]:
    """Sizes of tasks: from the data where they are on this machine, else as assumed."""
    reference = chosen.reference or context.tasks_folder
    if reference is not None and (reference == BUILTIN or Path(reference).exists()):
        return {name: _counted(task) for name, task in context.listed(chosen).items()}
    if not chosen.assume:
        context.reference(chosen)  # refuses a reference that was left open
        raise UsageError(f"a dry run needs tasks '{reference}' on this machine, or what to assume of them",
                         found="neither", remedy="assume: {tasks: N, rows: N, tokens: N}")  # fmt: skip
    assumed = chosen.assume
    number = len(chosen.names) if chosen.names else int(assumed["tasks"])
    names = chosen.names or [f"{reference}-{n}" for n in range(number)]
    number_of = {split: int(assumed.get(f"{split}_rows") or assumed["rows"]) for split in SPLITS}
    rows = RowCounts(**number_of, tokens=assumed["tokens"], options=2.0)
    notes.append(f"tasks '{reference}': {number} of {rows.train} training rows of {rows.tokens:.0f} tokens")
    return dict.fromkeys(names, rows)


def _counted(task: Task) -> RowCounts:
    sample = [row for split in ("train", "test") for row in task.split(split)[:50]]
    tokens = sum(len(row.source) + len(row.target) for row in sample) / len(sample) / CHARACTERS + 1
    options = sum(max(1, len(row.options or ())) for row in sample) / len(sample)
    return RowCounts(**{split: len(task.split(split)) for split in SPLITS}, tokens=tokens, options=options)


def _row(
    stage: Stage,
    skeleton: BaseSkeleton,
    train: Mapping[str, RowCounts],
    held_out: Mapping[str, RowCounts],
    speed: float,
    context: StudyContext,
) -> dict[str, Any]:
    row: dict[str, Any] = {"stage": identity(stage), "experts": 0, "parameters": 0, "steps": 0, "tokens": 0,
                           "disk_bytes": 0, "memory_bytes": 0, "seconds": 0.0}  # fmt: skip
    weights = skeleton.parameters * int(context.study.assume.get("dtype_bytes", 4))
    if isinstance(stage, BuildStage):
        sizes = list(_chosen(stage, train).values())
        return row | ({} if stage.of else _trained(stage, skeleton, sizes, weights, speed, context))
    if isinstance(stage, EvaluateStage):
        tokens = 0.0
        for library, _, split in stage.runs():
            built = context.study.stage(f"build:{library}")
            assert isinstance(built, BuildStage)
            tasks = held_out if split == "held_out" else _chosen(built, train)
            limit = getattr(stage, split)
            tokens += sum(min(limit, rows.test) * rows.tokens * rows.options for rows in tasks.values())
        return row | {"tokens": round(tokens), "memory_bytes": weights,
                      "seconds": 2 * skeleton.parameters * tokens / speed}  # fmt: skip
    if isinstance(stage, AdaptStage):
        settings = stage.train
        tasks = {name: rows for name, rows in held_out.items() if rows.train and rows.val}
        if missing := [name for name in stage.tasks or () if name not in tasks] or ([] if tasks else ["none"]):
            raise TaskError(f"adapt:{stage.name} must have held-out tasks with training and validation rows",
                            found=f"no such task: {missing[0]}" if stage.tasks else "none")  # fmt: skip
        tasks = {name: rows for name, rows in tasks.items() if stage.tasks is None or name in stage.tasks}
        methods = len(stage.methods)
        fed = [settings.num_steps(min(rows.train, settings.train_rows or rows.train)) for rows in tasks.values()]
        tokens = methods * sum(
            n * settings.batch_size * rows.tokens for n, rows in zip(fed, tasks.values(), strict=True)
        )
        skeleton.targets(settings)
        return row | {"experts": methods * len(tasks), "steps": methods * sum(fed), "tokens": round(tokens),
                      "memory_bytes": weights, "seconds": 4 * skeleton.parameters * tokens / speed}  # fmt: skip
    assert isinstance(stage, (BuildStage, DriftStage))
    return row


def _chosen(stage: BuildStage, train: Mapping[str, RowCounts]) -> dict[str, RowCounts]:
    names = list(train)
    if isinstance(stage.tasks, int):
        if not 0 < stage.tasks <= len(names):
            raise TaskError(f"build:{stage.name} must have between 1 and {len(names)} tasks", found=stage.tasks)
        names = names[: stage.tasks]
    elif stage.tasks is not None:
        if missing := [name for name in stage.tasks if name not in names]:
            raise TaskError(f"build:{stage.name} must name training tasks of the study", found=missing[0])
        names = list(stage.tasks)
    return {name: train[name] for name in names}


def _trained(
    stage: BuildStage,
    skeleton: BaseSkeleton,
    tasks: Sequence[RowCounts],
    weights: int,
    speed: float,
    context: StudyContext,
) -> dict[str, Any]:
    """Steps, tokens, memory and time of a build."""
    settings, method = stage.settings, stage.method
    expert_parameters = skeleton.adapter_parameters(settings)
    rows = [min(task.train, settings.train_rows or task.train) for task in tasks]
    mean = sum(n * task.tokens for n, task in zip(rows, tasks, strict=True)) / sum(rows)
    units = _units(stage, len(tasks))
    steps = sum(settings.num_steps(sum(rows) // units) for _ in range(units))
    experts = method.poly.skills if method.is_poly else units
    if method.method == "mbc" and method.clusters.by == "mbc" and stage.private is None:
        private = method.clusters.private_settings(settings)
        steps += sum(private.num_steps(n) for n in rows)
    tokens = steps * settings.batch_size * min(mean, settings.max_length)
    window = min(experts, context.study.run.window) if not method.is_poly else experts
    return {
        "experts": experts,
        "parameters": experts * expert_parameters,
        "steps": steps,
        "tokens": round(tokens),
        "disk_bytes": experts * expert_parameters * 4,
        "memory_bytes": weights
        + window * expert_parameters * EXPERT_BYTES
        + _activation_bytes(skeleton, settings, context),
        "seconds": _flops(skeleton, settings) * tokens / speed,
    }


def _units(stage: BuildStage, num_tasks: int) -> int:
    """How many experts are trained apart; for clusters that the adapters or families number, ten are assumed."""
    if stage.method.method == "private":
        return num_tasks
    if stage.method.method != "mbc":
        return 1
    k = stage.method.clusters.k[0] if stage.method.clusters.k else 10
    if k > num_tasks:
        raise UsageError(f"build:{stage.name} must have at most as many clusters as tasks", found=f"{k}, {num_tasks}")
    return k


def _flops(skeleton: BaseSkeleton, settings: BuildSettings) -> float:
    """Of a token in training: forward through all layers, backward through those above the lowest that is adapted."""
    above = (settings.upper_layers or skeleton.layers) / skeleton.layers
    return 2 * skeleton.parameters * (1 + above)


def _activation_bytes(skeleton: BaseSkeleton, settings: BuildSettings, context: StudyContext) -> int:
    """What the backward pass of a micro-batch keeps."""
    run, layers = context.study.run, settings.upper_layers or skeleton.layers
    tokens = max(run.fixed_tokens, settings.max_length)
    activations = 1 if run.activation_checkpointing else ACTIVATIONS
    return tokens * layers * skeleton.hidden * activations * int(context.study.assume.get("dtype_bytes", 4))
