"""What the training loop works with: jobs, settings, and what comes out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lorary.adapter import LoraFactors
from lorary.data.template import Example
from lorary.errors import TrainError
from lorary.numbers import MICRO_TOKENS
from lorary.train.optimiser import OptimiserSettings

Factors = dict[str, LoraFactors]  # by the path of the layer


@dataclass(frozen=True)
class Job:
    """One unit to be trained: an expert, or a whole Poly model.

    Args:
        name: its name, unique in a queue; all its random choices are keyed by it.
        train: encoded rows to train on.
        val: encoded rows that choose the best checkpoint.
        num_steps: optimiser steps, 1 or more; 0 where it has a start, which is evaluated then and stays as it is.
        rank: rank of its factors, at most that of the stack.
        alpha: scaling is alpha / rank.
        targets: paths of the layers it adapts; None takes all layers of the stack.
        train_tasks: number of the task of each training row; () means that all rows are of task 0.
        val_tasks: number of the task of each validation row; () means that all rows are of task 0.
        task_weights: how often a row is drawn from each task, in any unit; () takes the union of all rows in permuted
            epochs, so that each task comes in proportion to its rows.
        start: factors by path to begin with, of the job's rank or a smaller one, in layers that it adapts; what they
            leave free is drawn as for any job, and does nothing yet. All is drawn where None.
    """

    name: str
    train: Sequence[Example] = field(repr=False)
    val: Sequence[Example] = field(repr=False)
    num_steps: int
    rank: int
    alpha: float
    targets: frozenset[str] | None = None
    train_tasks: Sequence[int] = field(default=(), repr=False)
    val_tasks: Sequence[int] = field(default=(), repr=False)
    task_weights: Sequence[float] = ()
    start: Factors | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        rows = f"{len(self.train)} and {len(self.val)}"
        need = "at least one row to train on and one to validate on"
        self._check(bool(self.train and self.val), need, rows, "give its tasks rows of the splits train and val")
        sizes = f"{self.num_steps} steps, rank {self.rank}"
        need = "at least one step and rank 1"
        least = 1 if self.start is None else 0
        self._check(self.num_steps >= least and self.rank >= 1, need, sizes, "raise --steps or --rank")
        for examples, tasks in ((self.train, self.train_tasks), (self.val, self.val_tasks)):
            numbers = f"{len(tasks)} for {len(examples)} rows"
            self._check(len(tasks) in (0, len(examples)), "one task number for each row", numbers, "number all rows")
        weights = self.task_weights
        are_sound = all(0 < weight < math.inf for weight in weights)
        are_of_tasks = not weights or set(self.train_tasks or [0]) == set(range(len(weights)))
        need = "one sampling weight above 0 for each task with training rows"
        self._check(are_sound and are_of_tasks, need, list(weights), "leave out tasks that are not trained on")

    def _check(self, holds: bool, need: str, value: object, remedy: str) -> None:
        if not holds:
            raise TrainError(f"expert '{self.name}' needs {need}", found=value, remedy=remedy)


@dataclass(frozen=True)
class Trained:
    """What a vector of parameters holds for one unit.

    Args:
        adapters: factors by path, by the name of the adapter: one for an expert, one per skill for Poly.
        extras: what is no LoRA factor: nothing for an expert, logits by path for Poly.
    """

    adapters: dict[str, Factors]
    extras: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainedUnit:
    """One finished unit, at its best checkpoint.

    Args:
        name: name of its job.
        adapters: factors by path, by the name of the adapter: one for an expert, one per skill for Poly.
        extras: what is no LoRA factor: nothing for an expert, logits by path for Poly.
        train_losses: training loss before each step, nats per target token.
        val_losses: (steps done, validation loss) at each evaluation, step 0 being the initial weights.
        best_step: steps done at the best checkpoint.
        stopped_early: whether patience ended it before its last step.
    """

    name: str
    adapters: dict[str, Factors]
    extras: dict[str, Tensor]
    train_losses: list[float]
    val_losses: list[tuple[int, float]]
    best_step: int
    stopped_early: bool


@dataclass(frozen=True)
class LoopSettings:
    """How the units of a queue are trained.

    Args:
        optimiser: learning rate, warm-up, clipping; every unit has a schedule of its own.
        batch_size: rows per unit and step.
        dropout: probability of dropping an input feature of the adapters while training.
        num_evals: how often the validation loss is taken, evenly spaced, the last time after the last step.
        patience: a unit ends when so many evaluations in a row brought no improvement; None lets it run to its end.
        seed: of initial weights, order of rows and dropout.
        init: `shared` or `own` initial lora_a (see `ExpertStack.fill`).
        init_scale: bound of the initial lora_a, in units of PEFT's.
        max_tokens: tokens of one micro-batch; decides nothing but rounding, memory and speed. None lets the loop
            measure how many fit.
        save_every_s: seconds between checkpoints; when one is written decides nothing.
        activation_checkpointing: compute activations again in the backward pass instead of keeping them.
        autocast: multiply by the base's weights in bfloat16, whatever they are stored in. Factors, gradients, norms,
            losses and the optimiser's state stay in float32. bfloat16 has float32's range, so losses are not scaled.
    """

    optimiser: OptimiserSettings
    batch_size: int
    dropout: float = 0.0
    num_evals: int = 4
    patience: int | None = None
    seed: int = 0
    init: str = "shared"
    init_scale: float = 1.0
    max_tokens: int | None = MICRO_TOKENS
    save_every_s: float = 15.0
    activation_checkpointing: bool = False
    autocast: bool = False

    def eval_steps(self, num_steps: int) -> set[int]:
        """Steps done at the evaluations of a unit of so many steps; 0 is among them."""
        evals = min(self.num_evals, num_steps)
        return {0, *(round(num_steps * (i + 1) / evals) for i in range(evals))}
