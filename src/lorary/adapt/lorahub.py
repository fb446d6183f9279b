"""`lorahub`: one weight for each adapter, searched without gradients on a few rows (LoraHub, 2307.13269).

All candidates of a generation go through the model together, each in a slot of its own over the adapters that lie in
memory once. Whatever was tried is written down, so that a killed search repeats nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorary.adapt.context import AdaptContext
from lorary.adapt.mixture import commit_cut
from lorary.adapt.retrieve import retrieve
from lorary.build.shards import loop_settings
from lorary.data.template import Example
from lorary.library.files import encode_json, read_json, replace_file, reported
from lorary.merge.layers import mixed_layers
from lorary.merge.sums import sum_factors, sum_updates
from lorary.train.forward import Forward
from lorary.train.loop import seated
from lorary.train.mixture import MixtureStack
from lorary.train.search import WeightSearch
from lorary.train.slots import Slot
from lorary.train.units import Factors, Job

OUTPUTS = "outputs"


@dataclass(frozen=True)
class Generation:
    """What one generation gave.

    Args:
        candidates: weights of each.
        losses: of each on the training rows, nats per target token.
        best: the weights of the lowest objective in this generation and those before it.
        val_loss: their loss on the validation rows.
    """

    candidates: list[list[float]]
    losses: list[float]
    best: list[float]
    val_loss: float


def adapt_lorahub(context: AdaptContext, tasks: Sequence[str]) -> None:
    """Search weights for each task and commit what they make of the adapters.

    Args:
        context: where.
        tasks: their names; those whose result is there are left out.

    Raises:
        AdapterError: if factors of different ranks are to be mixed.
        MissingExtraError: if the package `cma` is not installed.
    """
    todo = [task for task in tasks if context.settings.name_for(task) not in context.into]
    chosen = retrieve(context, todo)
    with context.display.bar("searching weights", len(todo)) as bar:
        for task in todo:
            _adapt_task(context, task, chosen[task])
            bar.advance(task)


def _adapt_task(context: AdaptContext, task: str, names: Sequence[str]) -> None:
    job, adapters = context.job(task), [context.pool.get(name) for name in names]
    mix = context.settings.mix or OUTPUTS
    base_loss = context.base_loss(job.val)
    generations = _search(context, job, _Mixtures(context, adapters, mix), context.state(f"-search-{task}.json"))
    best, metrics = _judge(generations, [0.0] * len(names), base_loss)
    weights = {
        path: torch.tensor([best[member] for member in layer.members], dtype=torch.float64)
        for path, layer in mixed_layers(adapters).items()
    }
    modules = (sum_updates if mix == OUTPUTS else sum_factors)(adapters, weights)
    outcome = {
        "parents": context.pool.hashes_of(names),
        "metrics": metrics,
        "mean_weights": dict(zip(names, best, strict=True)),
    }
    commit_cut(context, task, modules, outcome, job.val)


def _judge(
    generations: Sequence[Generation], zero_weights: list[float], base_loss: float
) -> tuple[list[float], dict[str, Any]]:
    """The weights of the lowest validation loss, no adapter at all among them, and how the search went."""
    done, best, best_step, val_losses = 0, zero_weights, 0, [(0, base_loss)]
    for generation in generations:
        done += len(generation.candidates)
        if generation.val_loss < min(loss for _, loss in val_losses):
            best, best_step = generation.best, done
        val_losses.append((done, generation.val_loss))
    return best, {
        "val_loss_base": base_loss,
        "val_loss_start": base_loss,
        "val_loss": min(loss for _, loss in val_losses),
        "best_step": best_step,
        "val_losses": val_losses,
        "train_losses": [loss for generation in generations for loss in generation.losses],
    }


class _Mixtures:
    """Mixtures of adapters, each by one weight per adapter, tried out side by side.

    Args:
        context: where.
        adapters: factors by path, of each.
        mix: `outputs` or `factors`.
    """

    def __init__(self, context: AdaptContext, adapters: Sequence[Factors], mix: str) -> None:
        model = context.base.model
        self.search = WeightSearch(len(adapters), context.settings.budget, context.settings.train.seed)
        self.settings = loop_settings(context.settings.train, context.run)
        self.stack = MixtureStack(
            adapters,
            mix=mix,
            num_slots=self.search.size,
            starts={},
            is_tuned=False,
            weights_rate=1.0,
            dtype=torch.float64 if model.dtype == torch.float64 else torch.float32,
            device=model.device,
        )
        self.forward, self.max_tokens = Forward(model, self.stack, self.settings), context.run.fixed_tokens

    def losses(self, candidates: Sequence[Sequence[float]], rows: Sequence[Example]) -> list[float]:
        """Loss of each candidate on some rows, nats per target token; the stack must be seated."""
        for slot, weights in enumerate(candidates):
            self.stack.set_weights(slot, torch.tensor(weights, dtype=torch.float64))
        tried = Job("candidate", rows, rows, 1, 1, 1.0)
        slots = [Slot(index, tried, self.settings) for index in range(len(candidates))]
        return list(self.forward.validation_losses(slots, self.max_tokens).values())


def _search(context: AdaptContext, job: Job, mixtures: _Mixtures, path: Path) -> list[Generation]:
    """All generations. Those that an interrupted run wrote down are told to the search again, and not tried."""
    recorded = [Generation(**fields) for fields in read_json(path)["generations"]] if path.exists() else []
    generations: list[Generation] = []
    search, lowest, best, val_loss = mixtures.search, math.inf, list[float](), math.inf
    with seated(context.base.model, mixtures.stack, mixtures.settings):
        for number in range(search.num_generations):
            candidates = search.ask()
            if number < len(recorded) and recorded[number].candidates == candidates:
                losses = recorded[number].losses
            else:
                recorded, losses = recorded[:number], mixtures.losses(candidates, job.train)
            values = [loss + context.settings.l1 * _size(c) for loss, c in zip(losses, candidates, strict=True)]
            search.tell(values)
            if min(values) < lowest:
                lowest, best = min(values), candidates[values.index(min(values))]
                (val_loss,) = (
                    [recorded[number].val_loss] if number < len(recorded) else mixtures.losses([best], job.val)
                )
            generations.append(Generation(candidates, losses, best, val_loss))
            if number >= len(recorded):
                document = {"generations": [vars(generation) for generation in generations]}
                with reported(context.into.path):
                    replace_file(path, encode_json(document), path.with_suffix(".tmp"), follow_links=False)
    return generations


def _size(weights: Sequence[float]) -> float:
    """Mean absolute weight, which LoraHub adds to the loss so that adapters of no use get none."""
    return sum(map(abs, weights)) / len(weights)
