"""`poly`, `poly-z`, `cat`: a learnt weight for each adapter and layer; what is learnt beside them, and how they mix.

poly     factors, tuned too      as the paper's polylib_full
poly-z   factors, frozen         as the paper's polylib_selector
cat      outputs, frozen         LoRA Soups (2410.13025)
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lorary.adapt.context import AdaptContext
from lorary.adapt.retrieve import adapter_losses, retrieve
from lorary.adapt.settings import CAT, POLY
from lorary.build.experts import metrics_of
from lorary.build.progress import TrainingBar, opened_logs
from lorary.build.shards import loop_settings
from lorary.build.state import state_key
from lorary.data.template import Example
from lorary.keys import keyed_generator
from lorary.merge.layers import mixed_layers
from lorary.merge.truncate import truncate
from lorary.train.loop import train_queue
from lorary.train.mixture import MixtureStack, Weights
from lorary.train.units import Factors, TrainedUnit

# Bound of the initial weights of poly and poly-z, as in the paper's code.
WEIGHTS_BOUND = 1e-3


def adapt_mixture(context: AdaptContext, tasks: Sequence[str]) -> None:
    """Learn a mixture for each task; tasks that mix the same adapters learn in one pass, unless results are to be cut.

    A cut mixture is measured with nothing seated in the model, so that it cannot be committed in the middle of a pass;
    and what a killed run had not committed would be lost to the others.

    Args:
        context: where.
        tasks: their names. A resumed run must be given the same tasks in the same order, finished ones too.

    Raises:
        AdapterError: if factors of different ranks are to be mixed.
        TrainError: if the training cannot go on.
    """
    alike: dict[tuple[str, ...], list[str]] = {}
    for task, names in retrieve(context, tasks).items():
        alike.setdefault(names, []).append(task)
    for names, members in alike.items():
        for group in [members] if context.settings.rank is None else [[task] for task in members]:
            if not all(context.settings.name_for(task) in context.into for task in group):
                _learn(context, names, group)


def _learn(context: AdaptContext, names: Sequence[str], tasks: Sequence[str]) -> None:
    adapters = [context.pool.get(name) for name in names]
    targets = frozenset(mixed_layers(adapters))
    jobs = {task: context.job(task, targets=targets) for task in tasks}
    starts = {jobs[task].name: initial_weights(context, names, adapters, task) for task in tasks}
    base_losses = {task: context.base_loss(job.val) for task, job in jobs.items()}
    task_of = {job.name: task for task, job in jobs.items()}
    waiting: list[TrainedUnit] = []

    def commit(trained: TrainedUnit) -> None:
        task = task_of[trained.name]
        losses = {"val_loss_base": base_losses[task], "val_loss_start": trained.val_losses[0][1]}
        outcome = {
            "parents": context.pool.hashes_of(names),
            "metrics": {**metrics_of(trained), **losses},
            "mean_weights": mean_weights(names, adapters, trained.extras),
        }
        commit_cut(context, task, trained.adapters[trained.name], outcome, jobs[task].val)

    # A truncated mixture is measured anew, when nothing is seated in the model any more.
    on_finish = commit if context.settings.rank is None else waiting.append
    with (
        context.display.bar(f"mixing for {len(jobs)} tasks", sum(job.num_steps for job in jobs.values())) as bar,
        opened_logs(context.run.logs, context.log_folder, "adapt") as logs,
    ):
        watch = TrainingBar(bar, {job.name: job.num_steps for job in jobs.values()}, context.into.names())
        train_queue(
            context.base.model,
            list(jobs.values()),
            _stack(context, adapters, starts),
            loop_settings(context.settings.train, context.run),
            checkpoint=context.state(f"-{state_key([list(names), list(tasks)])}.safetensors"),
            on_finish=on_finish,
            callbacks=[watch, *logs],
        )
    for trained in waiting:
        commit(trained)


def _stack(context: AdaptContext, adapters: Sequence[Factors], starts: Mapping[str, Weights]) -> MixtureStack:
    s, model = context.settings, context.base.model
    return MixtureStack(
        adapters,
        mix="outputs" if s.method == CAT else "factors",
        num_slots=1 if s.method == POLY else min(context.run.window, len(starts)),
        starts=starts,
        is_tuned=s.method == POLY,
        weights_rate=s.weights_learning_rate / s.train.learning_rate,
        dtype=torch.float64 if model.dtype == torch.float64 else torch.float32,
        device=model.device,
    )


def initial_weights(
    context: AdaptContext, names: Sequence[str], adapters: Sequence[Factors], task: str
) -> dict[str, Tensor]:
    """What the weights of a task begin with, by layer.

    For cat all are equal, so that it begins with the mean of the updates. For poly and poly-z, as in the paper's code,
    the adapter of the task has 1 where there is one, and the others 0; else all are drawn from U(-0.001, 0.001), which
    is the base but for a trace.

    Args:
        context: where.
        names: of the adapters.
        adapters: factors by path, of each.
        task: its name.

    Returns:
        By path, float64, one weight for each adapter that has the layer.
    """
    task_members = [number for number, name in enumerate(names) if context.pool.is_of(name, task)]
    weights = {}
    for path, layer in mixed_layers(adapters).items():
        if context.settings.method == CAT:
            weights[path] = torch.full((len(layer.members),), 1.0 / len(names), dtype=torch.float64)
        elif task_members:
            weights[path] = torch.tensor(
                [float(member == task_members[0]) for member in layer.members], dtype=torch.float64
            )
        else:
            generator = keyed_generator("weights", context.settings.train.seed, path)
            draw = torch.rand(len(layer.members), generator=generator, dtype=torch.float64)
            weights[path] = draw.mul_(2).sub_(1).mul_(WEIGHTS_BOUND)
    return weights


def mean_weights(names: Sequence[str], adapters: Sequence[Factors], weights: Weights) -> dict[str, float]:
    """The weight of each adapter, averaged over the layers that it has."""
    layer_weights: dict[str, list[float]] = {name: [] for name in names}
    for path, layer in mixed_layers(adapters).items():
        for member, weight in zip(layer.members, weights[path].tolist(), strict=True):
            layer_weights[names[member]].append(weight)
    return {name: sum(values) / len(values) for name, values in layer_weights.items()}


def commit_cut(
    context: AdaptContext, task: str, modules: Factors, outcome: Mapping[str, Any], val: Sequence[Example]
) -> None:
    """Commit a mixture, brought to the rank that was asked for: then its loss is taken anew, and the error recorded.

    Where what is left is worse than the bare base, an adapter that does nothing is committed in its place.

    Args:
        context: where; nothing may be seated in its model where a rank was asked for.
        task: its name.
        modules: factors of the mixture, by path.
        outcome: as `AdaptContext.commit` takes it; its metrics are those of the whole mixture.
        val: validation rows, encoded.
    """
    rank = context.settings.rank
    if rank is not None:
        cut = truncate(modules, rank, next(iter(modules.values())).scaling)
        loss = adapter_losses(context, {task: cut.modules}, val)[task]
        loss_whole = outcome["metrics"]["val_loss"]
        metrics = {**outcome["metrics"], "val_loss": loss, "val_loss_whole": loss_whole, "truncation_error": cut.error}
        modules, outcome = cut.modules, {**outcome, "metrics": metrics}
        if loss > metrics["val_loss_base"]:
            modules = {
                path: replace(factors, lora_b=torch.zeros_like(factors.lora_b)) for path, factors in modules.items()
            }
            outcome = {**outcome, "metrics": {**metrics, "val_loss": metrics["val_loss_base"], "val_loss_cut": loss}}
    context.commit(task, modules, outcome)
