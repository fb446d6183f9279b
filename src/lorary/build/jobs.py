"""What a build makes, before anything is trained: an assignment of tasks to experts becomes a list of units."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any

from lorary.build.settings import BuildSettings
from lorary.data.schema import Row, Task
from lorary.data.template import Example, Template, warn_of_cuts
from lorary.errors import TaskError, UsageError
from lorary.library.folders import check_name
from lorary.reading import read_json
from lorary.train.units import Job

JOINT = "joint"
CLUSTER = "cluster_"
# What may differ from expert to expert within one pass: the rest belongs to the loop they share.
OVERRIDABLE = ("rank", "alpha", "target_modules", "upper_layers", "steps", "epochs")
_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "rank": ((int,), "a whole number"),
    "alpha": ((int, float), "a number"),
    "target_modules": ((list,), "a list"),
    "upper_layers": ((int, NoneType), "a whole number, or null for all layers"),
    "steps": ((int,), "a whole number"),
    "epochs": ((int, float), "a number"),
}


@dataclass(frozen=True)
class ExpertSpec:
    """One expert to be: a column of the assignment, plain data that travels to other machines.

    Args:
        name: its name in the library.
        tasks: the tasks it is trained on.
        settings: how.
        method: `private`, `joint` or `mbc`, for its provenance.
        parents: content hashes of the adapters that the assignment was made from.
        origin: how the assignment came about (clusters: by what, of how many), for its provenance.
    """

    name: str
    tasks: tuple[str, ...]
    settings: BuildSettings
    method: str = "private"
    parents: tuple[str, ...] = ()
    origin: Mapping[str, Any] = field(default_factory=dict)


def private_units(tasks: Iterable[str], settings: BuildSettings) -> list[ExpertSpec]:
    """The identity: one expert per task."""
    return [ExpertSpec(name, (name,), settings) for name in sorted(tasks)]


def joint_units(tasks: Iterable[str], settings: BuildSettings) -> list[ExpertSpec]:
    """One column: one expert of all tasks."""
    return [ExpertSpec(JOINT, tuple(sorted(tasks)), settings, method=JOINT)]


def cluster_units(
    labels: Mapping[str, int], settings: BuildSettings, parents: Mapping[str, str], origin: Mapping[str, Any]
) -> list[ExpertSpec]:
    """One-hot by cluster: one expert `cluster_N` of the tasks of each cluster.

    Args:
        labels: cluster of each task.
        settings: how the experts are trained.
        parents: content hash of the adapter that stood for each task; empty where no adapter decided.
        origin: how the clusters were made.
    """
    members: dict[int, list[str]] = {}
    for task in sorted(labels):
        members.setdefault(labels[task], []).append(task)
    return [
        ExpertSpec(
            f"{CLUSTER}{label}", tuple(names), settings, "mbc", tuple(parents[n] for n in names if n in parents), origin
        )
        for label, names in sorted(members.items())
    ]


def override(units: Sequence[ExpertSpec], changes: Mapping[str, Mapping[str, Any]]) -> list[ExpertSpec]:
    """Give single experts settings of their own.

    Args:
        units: the experts.
        changes: fields of `OVERRIDABLE` by the expert's name.

    Raises:
        UsageError: if there is no such expert or field, or a value is out of range.
    """
    names = [unit.name for unit in units]
    if unknown := sorted(set(changes) - set(names)):
        raise UsageError(
            "--overrides must name experts of this build", found=unknown[:5], remedy=f"it has {names[:10]}"
        )
    for name, fields in changes.items():
        if unknown := sorted(set(fields) - set(OVERRIDABLE)):
            raise UsageError(
                f"--overrides of expert '{name}' may set {', '.join(OVERRIDABLE)}", found=unknown, remedy="leave it out"
            )
    return [replace(unit, settings=_changed(unit, changes.get(unit.name, {}))) for unit in units]


def _changed(unit: ExpertSpec, fields: Mapping[str, Any]) -> BuildSettings:
    values = dict(fields)
    for key, (kinds, words) in _KINDS.items():
        # JSON's `true` is an int to Python.
        if key in values and (isinstance(values[key], bool) or not isinstance(values[key], kinds)):
            raise UsageError(f"--overrides of expert '{unit.name}' must give {key} as {words}", found=values)
    values |= {key: float(values[key]) for key in ("alpha", "epochs") if key in values}
    if "target_modules" in values:
        values["target_modules"] = tuple(values["target_modules"])
    if "steps" in values or "epochs" in values:
        values = {"steps": None, "epochs": None, **values}
    try:
        return replace(unit.settings, **values)
    except (TypeError, UsageError) as error:
        raise UsageError(f"--overrides of expert '{unit.name}' must be valid settings", found=error) from error


def read_overrides(path: str | Path) -> dict[str, dict[str, Any]]:
    """Read a file of overrides: a JSON object of objects.

    Raises:
        UsageError: if it is not there, or not that.
    """
    try:
        document = read_json(Path(path))
    except (OSError, ValueError) as error:
        raise UsageError(f"--overrides must name a JSON file: {path}", found=error) from error
    if not isinstance(document, dict) or not all(isinstance(fields, dict) for fields in document.values()):
        raise UsageError(f'--overrides must hold {{"EXPERT": {{"rank": 8, ...}}}}: {path}', found="something else")
    return document


def check_trainable(tasks: Mapping[str, Task]) -> None:
    """Refuse tasks that no expert can be made of, before anything is loaded or written.

    Raises:
        UsageError: if a task's name cannot be an expert's.
        TaskError: if a task lacks training or validation rows.
    """
    for name, task in tasks.items():
        check_name(name)
        for split in ("train", "val"):
            if not task.split(split):
                raise TaskError(f"task '{name}' must have {split} rows to build an expert", found="none")


def train_rows(task: Task, settings: BuildSettings) -> Sequence[Row]:
    """The training rows of a task that a build uses."""
    return task.split("train")[: settings.train_rows]


def num_steps(unit: ExpertSpec, tasks: Mapping[str, Task]) -> int:
    """Optimiser steps of a unit; with epochs, over the union of its tasks' rows."""
    return unit.settings.num_steps(sum(len(train_rows(tasks[name], unit.settings)) for name in unit.tasks))


def make_job(unit: ExpertSpec, tasks: Mapping[str, Task], template: Template, targets: frozenset[str] | None) -> Job:
    """Encode the rows of a unit.

    Args:
        unit: the expert to be.
        tasks: all tasks, by name.
        template: turns rows into token ids.
        targets: paths of the layers it adapts; None for all that the pass adapts.
    """
    train: list[Example] = []
    val: list[Example] = []
    owners: dict[str, list[int]] = {"train": [], "val": []}
    for number, name in enumerate(unit.tasks):
        chosen = {"train": train_rows(tasks[name], unit.settings), "val": tasks[name].split("val")}
        chosen["val"] = chosen["val"][: unit.settings.val_rows]
        encoded = {key: [template.encode(r.prompt, r.target) for r in rows] for key, rows in chosen.items()}
        warn_of_cuts(name, [*encoded["train"], *encoded["val"]])
        train += encoded["train"]
        val += encoded["val"]
        for key, rows in encoded.items():
            owners[key] += [number] * len(rows)
    is_multitask = len(unit.tasks) > 1
    return Job(
        name=unit.name,
        train=train,
        val=val,
        num_steps=num_steps(unit, tasks),
        train_tasks=tuple(owners["train"]) if is_multitask else (),
        val_tasks=tuple(owners["val"]) if is_multitask else (),
        task_weights=unit.settings.task_weights([owners["train"].count(n) for n in range(len(unit.tasks))]),
        rank=unit.settings.rank,
        alpha=unit.settings.alpha,
        targets=targets,
    )
