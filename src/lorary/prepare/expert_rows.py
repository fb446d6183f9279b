"""Training rows of the tasks of each expert: what the data of a router is measured on."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorary.data.schema import Row, Task
from lorary.data.tasks import load_tasks
from lorary.errors import TaskError, UsageError
from lorary.keys import keyed_generator
from lorary.library.store import Library

# NAME -> tasks, as a caller gives them.
Mapped = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class ExpertRows:
    """Training rows of the tasks of one expert.

    Args:
        rows: drawn from its tasks.
        hashes: data hash of each task, whole.
    """

    rows: tuple[Row, ...]
    hashes: Mapping[str, str]

    @property
    def tasks(self) -> Tensor:
        """(rows,) int64, the number of each row's task, in the order of `hashes`."""
        numbers = {name: number for number, name in enumerate(self.hashes)}
        return torch.tensor([numbers[row.task] for row in self.rows])


def rows_of_experts(
    library: Library,
    names: Sequence[str],
    reference: str,
    mapped: Mapped,
    num_rows: int,
    seed: int,
    columns: str | None = None,
) -> dict[str, ExpertRows]:
    """Rows of the tasks of each expert: those its provenance names, else the task of its name, or what it is mapped to.

    Args:
        library: the library.
        names: the experts.
        reference: where the tasks are, as `lorary.data.tasks.load_tasks` takes it.
        mapped: tasks of experts whose provenance names none, or in place of what it names.
        num_rows: training rows of each task, at most; drawn at random.
        seed: of the draw, which depends on it and the task alone.
        columns: as `lorary.data.tasks.load_tasks` takes it.

    Returns:
        By expert.

    Raises:
        UsageError: if a mapped expert is not in the library.
        TaskError: if the tasks of an expert are not known, not there, without training rows, or other data than it
            was trained on.
    """
    if unknown := sorted(set(mapped) - set(library.names())):
        raise UsageError("--map must name experts of the library", found=unknown[0], remedy=f"it has {library.names()}")
    hashes = {name: _tasks_of(library, name, mapped) for name in names}
    unnamed = [name for name in names if name not in mapped and not library.provenance(name)["tasks"]]
    tasks = _load(reference, hashes, unnamed, columns)
    return {name: draw_rows(name, [tasks[task] for task in hashes[name]], num_rows, seed) for name in names}


def parse_mapping(text: str | None) -> dict[str, list[str]]:
    """`a=task,b=other,a=third` as tasks by expert; nothing for None.

    Raises:
        UsageError: if a part is not NAME=TASK.
    """
    mapped: dict[str, list[str]] = {}
    for part in [] if text is None else text.split(","):
        name, _, task = (piece.strip() for piece in part.partition("="))
        if not (name and task):
            raise UsageError("--map must be NAME=TASK, separated by commas", found=repr(part))
        mapped.setdefault(name, []).append(task)
    return mapped


def _tasks_of(library: Library, name: str, mapped: Mapped) -> dict[str, str | None]:
    """Names of an expert's tasks, and the hash of the data that it was trained on, where that binds."""
    if name in mapped:
        return dict.fromkeys(mapped[name])
    provenance = library.provenance(name)
    hashes = provenance.get("data_hashes", {})
    return {task: hashes.get(task) for task in provenance["tasks"] or [name]}


def _load(
    reference: str, hashes_of: Mapping[str, Mapping[str, str | None]], unnamed: Collection[str], columns: str | None
) -> Mapping[str, Task]:
    try:
        names = sorted({task for hashes in hashes_of.values() for task in hashes})
        tasks = load_tasks(reference, names=names, columns=columns)
    except UsageError:
        for name, hashes in hashes_of.items():  # once more, one by one, to say whose it is
            _load_tasks_of(reference, name, hashes, columns, is_known=name not in unnamed)
        raise
    for name, hashes in hashes_of.items():
        for task, recorded in hashes.items():
            if recorded not in (None, tasks[task].data_hash):
                raise TaskError(
                    f"task '{task}' of '{reference}' must be the data that expert '{name}' was trained on",
                    found="another data hash",
                    remedy=f"--tasks with the data of the build, or --map {name}={task} to take it all the same",
                )
    return tasks


def _load_tasks_of(
    reference: str, name: str, hashes: Mapping[str, str | None], columns: str | None, *, is_known: bool
) -> None:
    try:
        load_tasks(reference, names=sorted(hashes), columns=columns)
    except UsageError as error:
        if not is_known:
            raise TaskError(
                f"the tasks of expert '{name}' must be known, to prepare a router for it",
                found=f"none in its provenance, and no task of its name in '{reference}'",
                remedy=f"--map {name}=TASK, with --tasks where the task is",
            ) from error
        raise TaskError(
            f"the tasks of expert '{name}' must be in '{reference}'",
            found=f"{error.rule}; found: {error.found}",
            remedy=f"--tasks with the data of the build, or --map {name}=TASK",
        ) from error


def draw_rows(name: str, tasks: Sequence[Task], num_rows: int, seed: int) -> ExpertRows:
    """Training rows of an expert's tasks.

    Args:
        name: of the expert.
        tasks: that it was trained on.
        num_rows: training rows of each task, at most; drawn at random.
        seed: of the draw, which depends on it and the task alone.

    Raises:
        TaskError: if a task has no training rows.
    """
    rows: list[Row] = []
    for task in tasks:
        training = task.split("train")
        if not training:
            raise TaskError(f"task '{task.name}' of expert '{name}' must have training rows", found="none")
        order = torch.randperm(len(training), generator=keyed_generator("prepare", seed, task.name))[:num_rows]
        rows += [training[i] for i in sorted(order.tolist())]
    return ExpertRows(tuple(rows), {task.name: task.data_hash for task in tasks})
