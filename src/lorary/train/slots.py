"""The state of a queue: which job sits in which slot, how far it has come, and the vectors of all of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from lorary.data.batching import input_length, plan_batches, plan_weighted_batches
from lorary.data.packing import Group
from lorary.data.template import Example
from lorary.train.flat import FlatParameters
from lorary.train.optimiser import SlotwiseAdamW
from lorary.train.units import Factors, Job, LoopSettings, TrainedUnit


@dataclass
class Progress:
    """How far a unit has come: steps done, and its losses."""

    step: int = 0
    train_losses: list[float] = field(default_factory=list)
    val_losses: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best(self) -> int:
        """Position of the lowest validation loss, the first of equals."""
        return min(range(len(self.val_losses)), key=lambda i: self.val_losses[i][1])


class Slot:
    """A slot of a stack and the job in it: one unit in training.

    Args:
        index: of the slot.
        job: what is trained.
        settings: how.
    """

    def __init__(self, index: int, job: Job, settings: LoopSettings) -> None:
        self.index, self.job, self.progress = index, job, Progress()
        self._patience, self._evaluations = settings.patience, settings.eval_steps(job.num_steps)
        lengths = [input_length(example) for example in job.train]
        size, key = (settings.batch_size, job.num_steps), (settings.seed, job.name)
        if job.task_weights:
            tasks = job.train_tasks or [0] * len(lengths)
            self._plan = plan_weighted_batches(lengths, tasks, job.task_weights, *size, *key)
        else:
            self._plan = plan_batches(lengths, *size, *key)

    @property
    def is_due(self) -> bool:
        """Whether its validation loss is to be taken before anything else."""
        evaluated = bool(self.progress.val_losses) and self.progress.val_losses[-1][0] == self.progress.step
        return self.progress.step in self._evaluations and not evaluated

    @property
    def is_stalled(self) -> bool:
        """Whether its patience is at an end."""
        losses = self.progress.val_losses
        return self._patience is not None and len(losses) - 1 - self.progress.best >= self._patience

    @property
    def is_finished(self) -> bool:
        """Whether it has nothing left to do."""
        return not self.is_due and (self.progress.step == self.job.num_steps or self.is_stalled)

    @property
    def draws(self) -> str:
        """What the dropout of its next step is keyed by, beside the seed."""
        return f"{self.job.name} step {self.progress.step}"

    @property
    def num_tokens(self) -> int:
        """Tokens fed for the rows of its next step, padding left out."""
        return sum(input_length(self.job.train[row]) for row in self._plan[self.progress.step])

    def train_groups(self) -> list[Group]:
        """The rows of its next step."""
        return self._group(self.job.train, self.job.train_tasks, self._plan[self.progress.step])

    def val_groups(self) -> list[Group]:
        """Its validation rows."""
        return self._group(self.job.val, self.job.val_tasks, range(len(self.job.val)))

    def _group(self, examples: Sequence[Example], tasks: Sequence[int], rows: Sequence[int]) -> list[Group]:
        """Rows by task, each named by its place among those asked for: a row may come twice in a batch."""
        members: dict[int, list[int]] = {}
        for name, row in enumerate(rows):
            members.setdefault(tasks[row] if tasks else 0, []).append(name)
        return [
            Group(self.index, task, [examples[rows[name]] for name in names], names)
            for task, names in sorted(members.items())
        ]


class Slots:
    """Jobs passing through the slots of a stack, in order.

    Args:
        jobs: the queue.
        stack: the parameters.
        settings: how to train.
    """

    def __init__(self, jobs: Sequence[Job], stack: FlatParameters, settings: LoopSettings) -> None:
        self.jobs, self.stack, self.settings = jobs, stack, settings
        self.waiting = 0  # position in the queue of the next job to take a slot
        self.max_tokens = settings.max_tokens  # of a micro-batch from now on; None until it is measured
        self.slots: list[Slot | None] = [None] * stack.num_slots
        scales = stack.rate_scales()
        sizes = [block.shape[1] for block in stack.blocks(stack.parameters)]
        blocks = list(zip(sizes, scales, strict=True)) if scales else []
        self.optimiser = SlotwiseAdamW(stack.parameters, stack.gradient, stack.num_slots, settings.optimiser, blocks)
        self.best = stack.parameters.clone()
        self.is_whole = True

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Marks a change that must not be saved half done, should an interrupt fall into it."""
        self.is_whole = False
        yield
        self.is_whole = True

    def present(self) -> list[Slot]:
        """Slots with a job, in order."""
        return [slot for slot in self.slots if slot is not None]

    def can_fill(self) -> bool:
        """Whether a slot is free for a job that waits."""
        return self.waiting < len(self.jobs) and None in self.slots

    def fill(self) -> None:
        """Seat waiting jobs in the free slots, in order."""
        with self.changing():
            for index, slot in enumerate(self.slots):
                if slot is None and self.waiting < len(self.jobs):
                    self.seat(index, self.jobs[self.waiting])
                    self.optimiser.reset(index)
                    self.waiting += 1

    def seat(self, index: int, job: Job) -> Slot:
        """Give a slot to a job, with its initial parameters."""
        settings = self.settings
        self.stack.fill(index, job, settings.seed, settings.init, settings.init_scale)
        slot = self.slots[index] = Slot(index, job, settings)
        return slot

    def step(self, losses: dict[int, float]) -> None:
        """Step every unit along its gradient.

        Args:
            losses: training loss by slot.
        """
        with self.changing():
            for slot in self.present():
                self.optimiser.step(slot.index, slot.progress.step, slot.job.num_steps)
                slot.progress.step += 1
                slot.progress.train_losses.append(losses[slot.index])

    def record(self, losses: dict[int, float]) -> None:
        """Note validation losses, and keep the parameters of those at their best.

        Args:
            losses: validation loss by slot.
        """
        with self.changing():
            for index, loss in losses.items():
                slot = self.slots[index]
                assert slot is not None
                progress = slot.progress
                progress.val_losses.append((progress.step, loss))
                if progress.val_losses[progress.best][0] == progress.step:
                    best, present = (v.view(len(self.slots), -1) for v in (self.best, self.stack.parameters))
                    best[index].copy_(present[index])

    def free(self, slot: Slot) -> None:
        """Take the job out of a slot."""
        self.slots[slot.index] = None

    def present_adapters(self, slot: Slot) -> dict[str, Factors]:
        """Copies of a slot's factors as they are now."""
        return self.stack.result(slot.index, slot.job, self.stack.parameters).adapters

    def result(self, slot: Slot) -> TrainedUnit:
        """What has become of a job: its best checkpoint."""
        best, progress = self.stack.result(slot.index, slot.job, self.best), slot.progress
        return TrainedUnit(
            name=slot.job.name,
            adapters=best.adapters,
            extras=best.extras,
            train_losses=list(progress.train_losses),
            val_losses=list(progress.val_losses),
            best_step=progress.val_losses[progress.best][0],
            stopped_early=progress.step < slot.job.num_steps,
        )
