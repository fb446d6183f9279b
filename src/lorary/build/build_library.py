"""Tasks become a library of experts. The library is the record of what is done, so that a killed build goes on.

Every method is an assignment of tasks to experts: the identity (private), one column (joint), clusters (mbc), or one
that is learnt (poly, mhr). Who decides it differs; `train_units` trains the experts of all of them.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from lorary.build.experts import val_losses
from lorary.build.jobs import check_trainable, joint_units, override, private_units
from lorary.build.mbc import build_mbc
from lorary.build.methods import MethodSettings
from lorary.build.poly_library import build_poly
from lorary.build.settings import BuildSettings, RunSettings
from lorary.build.state import sweep
from lorary.build.train_units import BuildContext, train_units
from lorary.data.decontaminate import Decontamination, keep_apart
from lorary.data.schema import Task
from lorary.data.tasks import load_tasks
from lorary.display import Display
from lorary.errors import TaskError, UsageError
from lorary.library.store import Library
from lorary.model.base import Base
from lorary.train.callbacks import Callback


@dataclass(frozen=True)
class BuildResult:
    """What a build did.

    Args:
        library: path of the library.
        method: how tasks were assigned to experts.
        trained: names of the experts trained by this run.
        kept: names of those that were there already.
        val_losses: for each expert, the validation loss of the bare base and of the expert, nats per target token.
        tasks: names of the tasks of each expert.
        choice: for mbc with several k, one row for each: k, mean validation loss over tasks, whether it was chosen.
        overlap: what tasks share with held-out ones, see `lorary.data.decontaminate`; None where nobody asked.
    """

    library: str
    method: str
    trained: list[str]
    kept: list[str]
    val_losses: dict[str, tuple[float, float]]
    tasks: dict[str, list[str]] = field(default_factory=dict)
    choice: list[dict[str, Any]] = field(default_factory=list)
    overlap: dict[str, Any] | None = None


def choose_tasks(reference: str, names: Sequence[str] | None, columns: str | None = None) -> dict[str, Task]:
    """Load the tasks to train on, by name.

    Args:
        reference: as `lorary.data.tasks.load_tasks` takes it.
        names: tasks to take; where None, all whose role is to be trained on.
        columns: as `load_tasks` takes it, too.

    Raises:
        TaskError: if there are none, or one lacks training or validation rows.
    """
    tasks = load_tasks(reference, names=names, columns=columns)
    chosen = {name: task for name, task in tasks.items() if names is not None or task.role == "train"}
    if not chosen:
        raise TaskError(
            f"'{reference}' must have tasks to train on", found=f"{len(tasks)} tasks, all held out",
            remedy="name them with --tasks to train on them all the same",
        )  # fmt: skip
    check_trainable(chosen)
    return chosen


def separate_tasks(
    tasks: dict[str, Task], held_out: str | None, overlap: str, display: Display
) -> tuple[dict[str, Task], Decontamination | None]:
    """The tasks to train on without those that overlap held-out ones; what is found is said.

    Args:
        tasks: by name.
        held_out: tasks to keep apart, by reference; None compares nothing.
        overlap: `report` or `drop`; whole tasks only, since those who train elsewhere load their rows by name.
        display: where it is said.

    Raises:
        LoraryError: as `keep_apart`.
    """
    if overlap not in ("report", "drop"):
        raise UsageError("--overlap must be report or drop", found=overlap)
    if held_out is None:
        if overlap != "report":
            raise UsageError("--overlap needs --held-out: the tasks to keep apart", found=f"--overlap {overlap} alone")
        return tasks, None
    separate, decontamination = keep_apart(tasks, held_out, overlap)
    for line in decontamination.lines():
        display.say(line)
    return separate, decontamination


def build_library(
    base: Base,
    library: Library,
    tasks: Mapping[str, Task],
    settings: BuildSettings,
    method: MethodSettings | None = None,
    *,
    run: RunSettings | None = None,
    callbacks: Sequence[Callback] = (),
    display: Display | None = None,
) -> BuildResult:
    """Build from what is in memory, in this process.

    Args:
        base: the frozen base model.
        library: over that base; experts it already holds from the same build are kept.
        tasks: tasks with training and validation rows, by name.
        settings: how to train.
        method: how to assign tasks to experts; one expert per task where None.
        run: how to run; its device and dtype are the base's own.
        callbacks: watch the training, all stages of it; closed at the end, whatever happens.
        display: where progress is shown.

    Returns:
        What was trained, what was kept, and the validation losses.

    Raises:
        LibraryError: if the library holds an expert of the same name from another build, or another build runs on it.
        BaseModelError: if the model is not the library's base.
        TaskError: if a task lacks training or validation rows.
        TrainError: if a loss is not finite, or a checkpoint cannot be written.
    """
    with ExitStack() as closing:
        for callback in callbacks:
            closing.callback(callback.close)
        check_trainable(tasks)
        context = BuildContext(library, tasks, run or RunSettings(), display or Display(), base, callbacks=callbacks)
        return build_experts(context, settings, method or MethodSettings())


def build_experts(context: BuildContext, settings: BuildSettings, method: MethodSettings) -> BuildResult:
    """Assign tasks to experts, train those that are missing, and commit them; see `build_library`."""
    library = context.library
    with library.build_lock():
        if context.base is not None:
            library.check_base(context.base.model)
        choice: list[dict[str, Any]] = []
        if method.is_poly:
            trained, kept = build_poly(context, settings, method.poly, mu=method.mu, per_task=method.per_task)
        elif method.method == "mbc":
            trained, kept, choice = build_mbc(context, settings, method.clusters, method.overrides)
        else:
            make = joint_units if method.method == "joint" else private_units
            units = override(make(sorted(context.tasks), settings), method.overrides)
            trained, kept = train_units(context, units)
        if trained:
            sweep(library.path)
    names = [*kept, *trained]
    owned = {name: list(library.provenance(name)["tasks"]) for name in sorted(names)}
    return BuildResult(
        str(library.path), method.method, trained, kept, val_losses(library, sorted(names)), owned, choice
    )
