"""`lora`, `joint`, `mu`, `nearest`: one adapter per task is trained, from nothing or from a start, all in one pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorary.adapt.context import AdaptContext
from lorary.adapt.retrieve import retrieve
from lorary.adapter import LoraFactors
from lorary.build.experts import metrics_of, targets_of
from lorary.build.progress import TrainingBar, opened_logs
from lorary.build.shards import loop_settings
from lorary.merge.sums import mean_of
from lorary.train.loop import train_queue
from lorary.train.stack import expert_stack
from lorary.train.units import Factors, Job, TrainedUnit

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Start:
    """Factors to begin with.

    Args:
        modules: by path.
        parents: content hash of each adapter they were made of, by name.
        error: what truncation left out of them, relative, in the Frobenius norm.
    """

    modules: Factors = field(repr=False)
    parents: Mapping[str, str]
    error: float = 0.0


def adapt_lora(context: AdaptContext, tasks: Sequence[str]) -> None:
    """`lora`: every task begins with nothing."""
    train_from(context, dict.fromkeys(tasks))


def adapt_mean(context: AdaptContext, tasks: Sequence[str]) -> None:
    """`joint` and `mu`: every task begins with the mean of the pool, which for joint is one adapter."""
    train_from(context, dict.fromkeys(tasks, _mean(context, context.pool.names)))


def adapt_nearest(context: AdaptContext, tasks: Sequence[str]) -> None:
    """`nearest`: every task begins with the mean of the adapters retrieved for it, which is one unless more are asked
    for.
    """
    train_from(context, {task: _mean(context, names) for task, names in retrieve(context, tasks).items()})


def _mean(context: AdaptContext, names: Sequence[str]) -> Start:
    mean = mean_of([context.pool.get(name) for name in names], context.settings.mix, context.settings.rank)
    return Start(mean.modules, context.pool.hashes_of(names), mean.error)


def train_from(context: AdaptContext, starts: Mapping[str, Start | None]) -> None:
    """Train an adapter for each task and commit it when it is done.

    Args:
        context: where.
        starts: what each task begins with, by the task's name; None begins with nothing. A resumed run must be given
            the same tasks in the same order, finished ones too.

    Raises:
        TrainError: if the training cannot go on.
    """
    base_losses: dict[str, float] = {}
    jobs, shapes = [], dict[str, tuple[int, int]]()
    for task in starts:
        job, job_shapes = _job(context, task, starts[task])
        jobs.append(job)
        shapes |= job_shapes
        base_losses[task] = context.base_loss(job.val)
    by_name = dict(zip((job.name for job in jobs), starts, strict=True))

    def commit(trained: TrainedUnit) -> None:
        task = by_name[trained.name]
        start = starts[task]
        is_start = start is not None and trained.best_step == 0
        modules = start.modules if start is not None and is_start else trained.adapters[trained.name]
        context.commit(task, modules, _outcome(trained, start, base_losses[task]))

    with (
        context.display.bar(f"adapting to {len(jobs)} tasks", sum(job.num_steps for job in jobs)) as bar,
        opened_logs(context.run.logs, context.log_folder, "adapt") as logs,
    ):
        watch = TrainingBar(bar, {job.name: job.num_steps for job in jobs}, context.into.names())
        train_queue(
            context.base.model,
            jobs,
            expert_stack(context.base.model, shapes, jobs, context.run.window),
            loop_settings(context.settings.train, context.run),
            checkpoint=context.state(".safetensors"),
            on_finish=commit,
            callbacks=[watch, *logs],
        )


def _job(context: AdaptContext, task: str, start: Start | None) -> tuple[Job, Shapes]:
    """The job of a task, and (d_in, d_out) of the layers that it adapts."""
    s = context.settings
    if start is None:
        shapes: Shapes = targets_of(context.base, s.train)
        rank, alpha = s.rank or s.train.rank, s.train.alpha
    else:
        shapes = {path: (factors.d_in, factors.d_out) for path, factors in start.modules.items()}
        rank = s.rank or max(factors.rank for factors in start.modules.values())
        alpha = _scaling(start.modules) * rank
    changes: dict[str, Any] = {"rank": rank, "alpha": alpha, "start": None if start is None else start.modules}
    if s.zero_shot:
        changes["num_steps"] = 0
    return context.job(task, targets=frozenset(shapes), **changes), shapes


def _scaling(modules: Mapping[str, LoraFactors]) -> float:
    return next(iter(modules.values())).scaling


def _outcome(trained: TrainedUnit, start: Start | None, base_loss: float) -> dict[str, Any]:
    metrics = {**metrics_of(trained), "val_loss_base": base_loss, "val_loss_start": trained.val_losses[0][1]}
    if start is None:
        return {"parents": {}, "metrics": metrics}
    return {"parents": start.parents, "metrics": {**metrics, "truncation_error": start.error}}
