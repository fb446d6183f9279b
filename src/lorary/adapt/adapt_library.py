"""New tasks get an adapter each, from scratch or out of a library. Run again, it goes on.

What a method ends with is again one ordinary adapter in a library, which computes just what was validated.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lorary.adapt.context import AdaptContext
from lorary.adapt.lorahub import adapt_lorahub
from lorary.adapt.mixture import adapt_mixture
from lorary.adapt.pool import pool_of
from lorary.adapt.retrieve import short_folder
from lorary.adapt.settings import (
    CAT,
    JOINT,
    LORA,
    LORAHUB,
    MU,
    NEAREST,
    POLY,
    POLY_Z,
    AdaptSettings,
)
from lorary.adapt.train import adapt_lora, adapt_mean, adapt_nearest
from lorary.build.jobs import check_trainable
from lorary.build.settings import RunSettings
from lorary.build.state import close_build, open_shards, remove_candidate
from lorary.data.schema import Task
from lorary.display import Display
from lorary.errors import LibraryError, UsageError
from lorary.library.folders import check_name
from lorary.library.opening import template_of
from lorary.library.store import Library
from lorary.model.base import Base


@dataclass(frozen=True)
class AdaptResult:
    """What an adaptation did.

    Args:
        library: path of the library that holds the results.
        method: how tasks were adapted to.
        names: name of the adapter of each task.
        val_losses: by task, the validation losses of the bare base, of the start and of the result, nats per target
            token.
        adapted: tasks that this run adapted to.
        kept: tasks whose adapter was there already.
        parents: by task, names of the adapters that the result was made of.
        errors: by task, what was left out by truncation, relative to the whole update, in the Frobenius norm.
    """

    library: str
    method: str
    names: dict[str, str]
    val_losses: dict[str, tuple[float, float, float]]
    adapted: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    parents: dict[str, list[str]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


# Each adapts to the tasks it is given, and commits what becomes of each; some may have been committed by a run that was
# killed.
ADAPT: Mapping[str, Callable[[AdaptContext, Sequence[str]], None]] = {
    LORA: adapt_lora,
    JOINT: adapt_mean,
    MU: adapt_mean,
    NEAREST: adapt_nearest,
    POLY: adapt_mixture,
    POLY_Z: adapt_mixture,
    CAT: adapt_mixture,
    LORAHUB: adapt_lorahub,
}


def adapt_library(
    base: Base,
    library: Library,
    tasks: Mapping[str, Task],
    settings: AdaptSettings,
    *,
    into: Library | None = None,
    run: RunSettings | None = None,
    display: Display | None = None,
) -> AdaptResult:
    """Adapt to tasks with what is in memory.

    Args:
        base: the frozen base model.
        library: over that base; to adapt from.
        tasks: tasks with training and validation rows, by name; each is adapted to by itself.
        settings: how.
        into: the library in which the results go; `library` itself where None. Results of the same adaptation that
            are there already are kept.
        run: how to run; its device and dtype are the base's own.
        display: where progress is shown.

    Returns:
        The names of the results, and their validation losses.

    Raises:
        LibraryError: if a name is taken by another adapter, an adapter to start from is not there or was trained with
            another template, or a build runs on the library of the results.
        BaseModelError: if the model is not the base of the libraries.
        TaskError: if a task lacks training or validation rows.
        UsageError: if a name cannot be an adapter's.
        TrainError: if a loss is not finite, or a checkpoint cannot be written.
    """
    into = library if into is None else into
    check_tasks(tasks, settings)
    pool = pool_of(library, settings)
    context = AdaptContext(base, into, tasks, settings, run or RunSettings(), display or Display(), pool)
    for opened in {opened.path: opened for opened in (library, into, pool.library)}.values():
        opened.check_base(base.model)
        template_of(opened, settings.train.template)
    with into.build_lock():
        _check_results(context)
        kept = [task for task in sorted(tasks) if context.is_finished(task)]
        if kept:
            context.display.say(f"{len(kept)} of {len(tasks)} tasks are adapted to already")
        adapted = [task for task in sorted(tasks) if task not in kept]
        if adapted:
            # A run that was killed goes on with the very company it began with.
            (company,) = open_shards(into.path, context.key, adapted, 1)
            ADAPT[settings.method](context, company)
            close_build(into.path, context.key)
            remove_candidate(short_folder(context))
    return _result(context, adapted, kept)


def _check_results(context: AdaptContext) -> None:
    """Refuse, before anything is trained, names of results that some file systems would take for one.

    Raises:
        LibraryError: if two differ in case alone, among themselves or from an adapter of the library.
    """
    names = {name.casefold(): name for name in context.into.names()}
    for task in sorted(context.tasks):
        name = context.settings.name_for(task)
        other = names.setdefault(name.casefold(), name)
        if other != name:
            raise LibraryError(
                f"names of adapters in library '{context.into.path}' must differ in more than case",
                found=f"'{other}' and '{name}'",
                remedy="rename one of the tasks, or adapt to them apart, with --name",
            )


def check_tasks(tasks: Mapping[str, Task], settings: AdaptSettings) -> None:
    """Refuse tasks that no adapter can be made of or named after.

    Raises:
        TaskError: if a task lacks training or validation rows.
        UsageError: if a name cannot be an adapter's.
    """
    check_trainable(tasks)
    if settings.name is not None and len(tasks) != 1:
        raise UsageError("--name names the adapter of one task", found=f"{len(tasks)} tasks", remedy="leave it out")
    for task in tasks:
        check_name(settings.name_for(task))


def _result(context: AdaptContext, adapted: list[str], kept: list[str]) -> AdaptResult:
    names = {task: context.settings.name_for(task) for task in sorted(context.tasks)}
    records = {task: context.into.provenance(name) for task, name in names.items()}
    metrics = {task: record["metrics"] for task, record in records.items()}
    keys = ("val_loss_base", "val_loss_start", "val_loss")
    losses = {task: tuple(float(task_metrics[key]) for key in keys) for task, task_metrics in metrics.items()}
    return AdaptResult(
        str(context.into.path),
        context.settings.method,
        names,
        {task: (values[0], values[1], values[2]) for task, values in losses.items()},
        adapted,
        kept,
        {task: list(record["parent_names"]) for task, record in records.items()},
        {task: float(task_metrics.get("truncation_error", 0.0)) for task, task_metrics in metrics.items()},
    )
