"""One pass of training: a window of experts over one frozen base, each as if it were alone."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorary.adapter import LoraFactors
from lorary.data.batching import Batch, collate, input_length, length_buckets, plan_batches
from lorary.data.template import Example
from lorary.errors import TrainError, UsageError
from lorary.lora.seat import seat, unseat
from lorary.model.logits import target_losses
from lorary.train.checkpoint import Progress, load_checkpoint, save_checkpoint
from lorary.train.optimiser import ExpertwiseAdamW, OptimiserSettings
from lorary.train.stack import ExpertStack


@dataclass(frozen=True)
class LoopSettings:
    """How one window of experts is trained.

    Args:
        optimiser: learning rate, steps, warm-up, clipping.
        batch_size: rows per expert and step.
        rank: rank of every expert.
        alpha: scaling is alpha / rank.
        dropout: probability of dropping an input feature of the adapters while training.
        num_evals: how often the validation loss is taken, evenly spaced, the last time after the last step.
        seed: of initial weights, order of rows and dropout.
        init: `shared` or `own` initial lora_a (see `ExpertStack.initialise`).
        init_scale: bound of the initial lora_a, in units of PEFT's.
        max_tokens: padded tokens of one micro-batch.
        save_every_s: seconds between checkpoints; when one is written decides nothing.
    """

    optimiser: OptimiserSettings
    batch_size: int
    rank: int
    alpha: float
    dropout: float = 0.0
    num_evals: int = 4
    seed: int = 0
    init: str = "shared"
    init_scale: float = 1.0
    max_tokens: int = 1024
    save_every_s: float = 15.0

    def eval_steps(self) -> set[int]:
        """Numbers of the steps (from 1) after which the validation loss is taken."""
        steps, evals = self.optimiser.num_steps, self.num_evals
        return {round(steps * (i + 1) / evals) for i in range(evals)}


@dataclass(frozen=True)
class ExpertData:
    """What one expert is trained on: encoded rows for training and for choosing the best checkpoint."""

    name: str
    train: Sequence[Example]
    val: Sequence[Example]


@dataclass(frozen=True)
class TrainedExpert:
    """One finished expert.

    Args:
        name: its name.
        modules: factors of its best checkpoint, by path.
        train_losses: training loss of each step, nats per target token.
        val_losses: (steps done, validation loss) at each evaluation, step 0 being the bare base.
        best_step: steps done at the best checkpoint.
    """

    name: str
    modules: dict[str, LoraFactors]
    train_losses: list[float]
    val_losses: list[tuple[int, float]]
    best_step: int


@dataclass
class Hooks:
    """What a caller may watch: `on_step(step, losses by expert)` and `on_eval(step, losses by expert)`."""

    on_step: Callable[[int, dict[str, float]], None] = field(default=lambda step, losses: None)
    on_eval: Callable[[int, dict[str, float]], None] = field(default=lambda step, losses: None)


def train_window(
    model: Any,
    experts: Sequence[ExpertData],
    targets: dict[str, tuple[int, int]],
    settings: LoopSettings,
    checkpoint: Path | None = None,
    hooks: Hooks | None = None,
) -> list[TrainedExpert]:
    """Train experts together; the result is what training each alone would give, up to rounding.

    The base is frozen and shared; the losses of the experts are summed, which leaves their gradients apart. A run that
    was killed goes on from its last checkpoint and ends with the same bits, since every random choice is keyed by
    (seed, expert, step).

    Args:
        model: the frozen base model, bare; experts are seated while training and gone afterwards.
        experts: the window; order and company change nothing but rounding.
        targets: (d_in, d_out) of each adapted layer, by path.
        settings: how to train.
        checkpoint: file to resume from and save to; removed by the caller once the experts are stored.
        hooks: callbacks for progress.

    Returns:
        The experts, in the order given.

    Raises:
        TrainError: if a loss is not finite, naming the expert and the step; if an expert has no rows; if the
            checkpoint is damaged or of other experts.
        UsageError: if the model is in training mode.
    """
    _refuse_empty(experts)
    if model.training:
        # Dropout of the base itself would draw from one stream for all experts.
        raise UsageError("the base model must be in evaluation mode", found="training mode", remedy="model.eval()")
    hooks = hooks or Hooks()
    parameter = next(model.parameters())
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    scaling = settings.alpha / settings.rank
    stack = ExpertStack([e.name for e in experts], targets, settings.rank, scaling, dtype, parameter.device)
    optimiser = ExpertwiseAdamW(stack.parameters, settings.optimiser)
    best = stack.parameters.clone()
    progress = load_checkpoint(checkpoint, stack.names, stack.parameters, optimiser, best) if checkpoint else None
    handles = seat(model, stack.modules)
    try:
        if progress is None:
            stack.initialise(settings.seed, settings.init, settings.init_scale)
            progress = Progress(train_losses={e.name: [] for e in experts}, val_losses={e.name: [] for e in experts})
            _evaluate(model, experts, stack, settings, progress, best, hooks)
        _run(model, experts, stack, optimiser, settings, progress, best, checkpoint, hooks)
    finally:
        unseat(model, list(stack.modules), handles)
    return [
        TrainedExpert(
            name=expert.name,
            modules=stack.factors(row, best),
            train_losses=progress.train_losses[expert.name],
            val_losses=[(int(step), loss) for step, loss in progress.val_losses[expert.name]],
            best_step=int(min(progress.val_losses[expert.name], key=lambda entry: entry[1])[0]),
        )
        for row, expert in enumerate(experts)
    ]


def _run(
    model: Any,
    experts: Sequence[ExpertData],
    stack: ExpertStack,
    optimiser: ExpertwiseAdamW,
    settings: LoopSettings,
    progress: Progress,
    best: Tensor,
    checkpoint: Path | None,
    hooks: Hooks,
) -> None:
    num_steps, evals = settings.optimiser.num_steps, settings.eval_steps()
    plans = [
        plan_batches([input_length(x) for x in e.train], settings.batch_size, num_steps, settings.seed, e.name)
        for e in experts
    ]
    saved = time.monotonic()
    for step in range(progress.step, num_steps):
        rows = [[e.train[i] for i in plan[step]] for e, plan in zip(experts, plans, strict=True)]
        losses = train_step(model, rows, stack, optimiser, settings, step)
        progress.step = step + 1
        for name, loss in losses.items():
            progress.train_losses[name].append(loss)
        hooks.on_step(step + 1, losses)
        if step + 1 in evals:
            _evaluate(model, experts, stack, settings, progress, best, hooks)
        if checkpoint and (step + 1 in evals or time.monotonic() - saved >= settings.save_every_s):
            saved = time.monotonic()
            save_checkpoint(checkpoint, progress, stack.parameters, optimiser, best)


def train_step(
    model: Any,
    rows: Sequence[Sequence[Example]],
    stack: ExpertStack,
    optimiser: ExpertwiseAdamW,
    settings: LoopSettings,
    step: int,
) -> dict[str, float]:
    """One step of every expert of a stack.

    Args:
        model: the base, with the stack seated.
        rows: one list of rows per expert, all of the same number.
        stack: the experts.
        optimiser: over `stack.parameters`.
        settings: how to train.
        step: number of the step, from 0.

    Returns:
        The loss of each expert before the step, nats per target token.

    Raises:
        TrainError: if a loss is not finite.
    """
    stack.gradient.zero_()
    num_targets = torch.tensor([sum(len(x.target_ids) for x in own) for own in rows], dtype=torch.float64)
    losses = torch.zeros(len(rows), dtype=torch.float64)
    for members, start, stop in _micro_batches(rows, settings.max_tokens):
        # The key says which of its own rows an expert meets, and nothing of the micro-batches of others.
        _tag(stack, members, [rows[m][start:stop] for m in members], settings, (settings.seed, step, start))
        batch, owner = _gather(stack, [rows[m][start:stop] for m in members])
        each = target_losses(model, batch)
        weights = (1.0 / num_targets[members])[owner].to(each)
        (each * weights).sum().backward()
        losses.index_add_(0, torch.tensor(members)[owner], each.detach().double().cpu() / num_targets[members][owner])
    _refuse_not_finite("training", dict(zip(stack.names, losses.tolist(), strict=True)), step + 1)
    optimiser.step(stack.gradient, stack.blocks(stack.gradient), step)
    return dict(zip(stack.names, losses.tolist(), strict=True))


def _micro_batches(rows: Sequence[Sequence[Example]], max_tokens: int) -> Iterator[tuple[list[int], int, int]]:
    """(experts, first row, end row) of each micro-batch: experts of similar length share one, under the budget.

    Where the rows of a single expert are over the budget, they are cut into several micro-batches.
    """
    num_rows = len(rows[0])
    lengths = [max(input_length(x) for x in own) for own in rows]
    for members in length_buckets([length * num_rows for length in lengths], max_tokens):
        rows_at_once = num_rows if len(members) > 1 else max(1, min(num_rows, max_tokens // lengths[members[0]]))
        for start in range(0, num_rows, rows_at_once):
            yield sorted(members), start, min(start + rows_at_once, num_rows)


def _tag(
    stack: ExpertStack,
    members: list[int],
    rows: Sequence[Sequence[Example]],
    settings: LoopSettings,
    key: tuple[int, ...],
) -> None:
    tags = stack.tags
    tags.experts = torch.tensor(members, device=stack.parameters.device)
    tags.names = tuple(stack.names[m] for m in members)
    tags.lengths = tuple(max(input_length(x) for x in own) for own in rows)
    tags.dropout, tags.key = settings.dropout, key


def _gather(stack: ExpertStack, rows: Sequence[Sequence[Example]]) -> tuple[Batch, Tensor]:
    """One batch of all rows, and for each target token the position of its expert among those of the batch."""
    batch = collate([x for own in rows for x in own])
    owner = batch.rows // len(rows[0])
    return batch.to(stack.parameters.device), owner


def _evaluate(
    model: Any,
    experts: Sequence[ExpertData],
    stack: ExpertStack,
    settings: LoopSettings,
    progress: Progress,
    best: Tensor,
    hooks: Hooks,
) -> None:
    """Take every expert's validation loss; keep the parameters of those at their best."""
    losses = {}
    for row, expert in enumerate(experts):
        loss = validation_loss(model, row, expert.val, stack, settings.max_tokens)
        if loss < min((before for _, before in progress.val_losses[expert.name]), default=float("inf")):
            for kept, block in zip(stack.blocks(best), stack.blocks(stack.parameters), strict=True):
                kept[row] = block[row]
        progress.val_losses[expert.name].append((progress.step, loss))
        losses[expert.name] = loss
    _refuse_not_finite("validation", losses, progress.step)
    hooks.on_eval(progress.step, losses)


@torch.no_grad()
def validation_loss(model: Any, row: int, examples: Sequence[Example], stack: ExpertStack, max_tokens: int) -> float:
    """Mean loss of one expert over its validation rows, nats per target token.

    Args:
        model: the base, with the stack seated.
        row: position of the expert in the stack.
        examples: its validation rows.
        stack: the experts.
        max_tokens: padded tokens of one batch.

    Returns:
        The loss.
    """
    total = 0.0
    stack.tags.experts, stack.tags.dropout = torch.tensor([row], device=stack.parameters.device), 0.0
    for bucket in length_buckets([input_length(x) for x in examples], max_tokens):
        batch = collate([examples[i] for i in bucket]).to(stack.parameters.device)
        total += float(target_losses(model, batch).double().sum())
    return total / sum(len(x.target_ids) for x in examples)


def _refuse_empty(experts: Sequence[ExpertData]) -> None:
    for expert in experts:
        if not expert.train or not expert.val:
            raise TrainError(
                f"expert '{expert.name}' needs at least one row to train on and one to validate on",
                found=f"{len(expert.train)} and {len(expert.val)}",
                remedy="give its task rows of the splits train and val",
            )


def _refuse_not_finite(kind: str, losses: Mapping[str, float], step: int) -> None:
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise TrainError(
                f"the {kind} loss of expert '{name}' must be finite at step {step}",
                found=loss,
                remedy="lower --learning-rate, or look for broken rows in its task",
            )
