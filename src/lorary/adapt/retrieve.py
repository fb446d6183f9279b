"""Which adapters of the pool a task is adapted from: those with the lowest loss, the most alike, or any."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lorary.adapt.context import AdaptContext
from lorary.adapt.settings import NEAREST
from lorary.build.cluster_settings import ClusterSettings
from lorary.build.jobs import private_units
from lorary.build.shards import loop_settings
from lorary.build.state import SHORT
from lorary.build.train_units import BuildContext, train_units
from lorary.cluster.similarity import adapter_similarity
from lorary.data.template import Example
from lorary.keys import keyed_generator
from lorary.library.files import encode_json, read_json, replace_file, reported
from lorary.library.layout import BUILD_FOLDER, LIBRARY_FILE
from lorary.library.store import Library
from lorary.train.loop import train_queue
from lorary.train.stack import expert_stack
from lorary.train.units import Factors, Job, TrainedUnit


def retrieve(context: AdaptContext, tasks: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Choose adapters of the pool for each task.

    Args:
        context: where, and how many by what.
        tasks: their names.

    Returns:
        For each task the names in the pool's order; all where no number is asked for, or there are no more.
    """
    s, names = context.settings, context.pool.names
    number = 1 if s.sk is None and s.method == NEAREST else s.sk
    if number is None or number >= len(names):
        return dict.fromkeys(tasks, names)
    scores = {"loss": _by_loss, "delta": _by_delta, "random": _by_chance}[s.retrieve](context, tasks)
    best = {
        task: sorted(task_scores, key=lambda name: (task_scores[name], name))[:number]
        for task, task_scores in scores.items()
    }
    return {task: tuple(sorted(chosen)) for task, chosen in best.items()}


def _by_chance(context: AdaptContext, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """A random number for each task and adapter, keyed by the seed and both names."""
    seed = context.settings.train.seed
    return {
        task: {
            name: float(torch.rand((), generator=keyed_generator("retrieve", seed, task, name)))
            for name in context.pool.names
        }
        for task in tasks
    }


def _by_loss(context: AdaptContext, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """The loss of each adapter of the pool on some training rows of each task, nats per target token.

    No training is needed, any adapter can be judged whatever its rank, layers and history, and it is the very thing
    that the task is about. What is known of a task is kept until the adaptation ends.
    """
    path = context.state("-retrieved.json")
    losses: dict[str, dict[str, float]] = read_json(path) if path.exists() else {}
    missing = [task for task in tasks if task not in losses]
    with context.display.bar("looking for adapters", len(missing)) as bar:
        for task in missing:
            rows = context.job(task).train[: context.settings.retrieve_rows]
            losses[task] = losses_of(context, context.pool.names, rows)
            with reported(context.into.path):
                replace_file(path, encode_json(losses), path.with_suffix(".tmp"), follow_links=False)
            bar.advance(task)
    return {task: losses[task] for task in tasks}


def losses_of(context: AdaptContext, names: Sequence[str], rows: Sequence[Example]) -> dict[str, float]:
    """The loss of adapters of the pool on some rows, as many in memory as are trained at a time."""
    losses = {}
    for start in range(0, len(names), context.run.window):
        adapters = {name: context.pool.get(name) for name in names[start : start + context.run.window]}
        losses.update(adapter_losses(context, adapters, rows))
    return losses


def adapter_losses(context: AdaptContext, adapters: Mapping[str, Factors], rows: Sequence[Example]) -> dict[str, float]:
    """The loss of adapters as they are.

    Args:
        context: where.
        adapters: factors by path, by name.
        rows: encoded.

    Returns:
        By name, nats per target token.
    """
    jobs = [_waiting(name, modules, rows) for name, modules in adapters.items()]
    shapes = {path: (f.d_in, f.d_out) for modules in adapters.values() for path, f in modules.items()}
    losses = {}

    def note(unit: TrainedUnit) -> None:
        losses[unit.name] = unit.val_losses[0][1]

    model = context.base.model
    stack = expert_stack(model, shapes, jobs, context.run.window)
    train_queue(model, jobs, stack, loop_settings(context.settings.train, context.run), on_finish=note)
    return losses


def _waiting(name: str, modules: Factors, rows: Sequence[Example]) -> Job:
    """A job that begins with an adapter and takes no step."""
    rank = max(factors.rank for factors in modules.values())
    alpha = next(iter(modules.values())).scaling * rank
    return Job(name, rows, rows, 0, rank, alpha, targets=frozenset(modules), start=modules)


def _by_delta(context: AdaptContext, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """Minus the cosine between the updates of a short adapter of each task and those of the pool."""
    short = _short_adapters(context, tasks)
    pool = context.pool
    order = [(pool.library, name) for name in pool.names] + [(short, task) for task in tasks]
    cosines = adapter_similarity(library.get(name) for library, name in order)
    return {
        task: dict(zip(pool.names, (-cosines[len(pool.names) + row, : len(pool.names)]).tolist(), strict=True))
        for row, task in enumerate(tasks)
    }


def _short_adapters(context: AdaptContext, tasks: Sequence[str]) -> Library:
    """A library with a short private adapter of each task, trained as the first stage of MBC trains it."""
    folder = short_folder(context)
    is_new = not (folder / LIBRARY_FILE).exists()  # a folder without one is what a killed run left
    base, record = context.base, context.into.base
    library = Library.create(folder, base.model, base_name=record.name) if is_new else Library.open(folder)
    settings = ClusterSettings().private_settings(context.settings.train)
    inner = BuildContext(
        library,
        {task: context.tasks[task] for task in tasks},
        context.run,
        context.display,
        base,
        logs=context.log_folder,
    )
    with library.build_lock():
        train_units(inner, private_units(tasks, settings))
    return library


def short_folder(context: AdaptContext) -> Path:
    """Where the short adapters lie until the adaptation ends."""
    return context.into.path / BUILD_FOLDER / f"{SHORT}{context.key}"
