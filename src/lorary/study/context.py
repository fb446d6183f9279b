"""What the stages of a study share: its folder, tasks, base model and clock."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from lorary.build.build_library import choose_tasks
from lorary.data.schema import Task
from lorary.data.tasks import load_tasks
from lorary.display import Display
from lorary.errors import TaskError, UsageError
from lorary.evaluate.base_key import content_of_files
from lorary.formats.base import resolve_base
from lorary.model.base import Base, load_base
from lorary.study.config import BuildStage, Study, TaskSet
from lorary.train.callbacks import Halt


class OutOfTime(Halt):
    """The time given to a study is over; what was finished is kept."""


class TimedDisplay(Display):
    """A display that knows when the time given to a study is over.

    Args:
        deadline: on `time.monotonic`; None for never.
    """

    def __init__(self, deadline: float | None = None) -> None:
        super().__init__()
        self.deadline = deadline

    def check_time(self) -> None:
        """Raise `OutOfTime` if it is over."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfTime


@dataclass(frozen=True)
class StudyContext:
    """What the stages of a study share.

    Args:
        study: what is to be done.
        out: its folder.
        tasks_folder: for the sets of tasks that name no reference.
        options: further ones that the command was given, as they are written.
        display: where progress is shown.
    """

    study: Study
    out: Path
    tasks_folder: str | None = None
    options: str = ""
    display: TimedDisplay = field(default_factory=TimedDisplay)

    def library(self, name: str) -> Path:
        """Folder of a library."""
        return self.out / "libraries" / name

    def results(self, stage: str) -> Path:
        """File of what a stage measured.

        Args:
            stage: its identity.
        """
        return self.out / "results" / f"{stage.replace(':', '-')}.json"

    @cached_property
    def base_content(self) -> str:
        """Hash of what the base model and its tokenizer do, from their files."""
        return content_of_files(resolve_base(self.study.base))

    @cached_property
    def base(self) -> Base:
        """The base model, loaded when the first stage needs it; every stage leaves it bare."""
        return load_base(self.study.base, dtype=self.study.run.dtype, device=self.study.run.device)

    @cached_property
    def _loaded(self) -> dict[str, dict[str, Task]]:
        return {}

    def reference(self, tasks: TaskSet) -> str:
        """What a set of tasks is loaded by.

        Raises:
            UsageError: if that must be given and is not.
        """
        reference = tasks.reference or self.tasks_folder
        if reference is None:
            raise UsageError(
                f"study '{self.study.name}' needs the folder of its tasks, which is no part of Lorary",
                found="no --tasks",
                remedy="--tasks FOLDER, or set LORARY_TASKS",
            )
        return reference

    def training_tasks(self, stage: BuildStage) -> tuple[str, dict[str, Task]]:
        """The reference and the tasks of a library, in the study's order.

        Raises:
            UsageError: if there is nothing at the reference, or a task is not there.
            TaskError: if the study has fewer than the library shall have, or one lacks rows.
        """
        chosen = self.study.train
        reference = stage.data or self.reference(chosen)
        names = chosen.names if not isinstance(stage.tasks, tuple) else stage.tasks
        tasks = self._trainable(reference, names)
        order = list(names or tasks)
        if isinstance(stage.tasks, int):
            if not 0 < stage.tasks <= len(order):
                raise TaskError(f"build:{stage.name} must have between 1 and {len(order)} tasks", found=stage.tasks)
            order = order[: stage.tasks]
        return reference, {name: tasks[name] for name in order}

    def _trainable(self, reference: str, names: tuple[str, ...] | None) -> dict[str, Task]:
        key = f"{reference}\n{names}"
        if key not in self._loaded:
            self._loaded[key] = choose_tasks(reference, names)
        return self._loaded[key]

    def listed(self, tasks: TaskSet) -> dict[str, Task]:
        """Tasks of a set, in its order: those to train on, or the held-out ones.

        Raises:
            UsageError: if there is nothing at the reference, or a task is not there.
        """
        reference = self.reference(tasks)
        if tasks is self.study.train:
            trainable = self._trainable(reference, tasks.names)
            return {name: trainable[name] for name in tasks.names or trainable}
        loaded = load_tasks(reference, names=tasks.names)
        return {name: loaded[name] for name in tasks.names or loaded if tasks.names or loaded[name].role == "heldout"}

    @cached_property
    def held_out_tasks(self) -> Mapping[str, Task]:
        """Tasks that nothing is trained on and that have test rows.

        Raises:
            TaskError: if two sets have a task of one name.
        """
        return {name: task for tasks in self._held_out for name, task in tasks.items()}

    @cached_property
    def _held_out(self) -> list[dict[str, Task]]:
        listed = [self.listed(chosen) for chosen in self.study.held_out]
        names = [name for tasks in listed for name in tasks]
        if twice := [name for name in names if names.count(name) > 1]:
            raise TaskError("a held-out task must be in one set alone", found=f"'{twice[0]}', twice",
                            remedy="name the tasks of each set, or rename one")  # fmt: skip
        return [{name: task for name, task in tasks.items() if task.split("test")} for tasks in listed]

    @cached_property
    def held_out_sets(self) -> Mapping[str, Sequence[str]]:
        """Names of the held-out tasks of every set that has a name."""
        named = zip(self.study.held_out, self._held_out, strict=True)
        return {chosen.name: list(tasks) for chosen, tasks in named if chosen.name is not None}
