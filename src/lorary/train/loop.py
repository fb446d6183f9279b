"""The training loop: a queue of units through the slots of a stack over one frozen base, each as if it were alone."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lorary.errors import TrainError, UsageError
from lorary.lora.seat import seat, unseat
from lorary.ops.memory import is_out_of_memory, release_memory
from lorary.train.activations import recomputed
from lorary.train.budget import find_budget
from lorary.train.callbacks import Callback, Halt
from lorary.train.checkpoint import load_checkpoint, save_checkpoint
from lorary.train.flat import FlatParameters
from lorary.train.forward import DoesNotFit, Forward
from lorary.train.onednn import packed_weights
from lorary.train.slots import Slot, Slots
from lorary.train.units import Job, LoopSettings, TrainedUnit


def train_queue(
    model: Any,
    jobs: Sequence[Job],
    stack: FlatParameters,
    settings: LoopSettings,
    *,
    checkpoint: Path | None = None,
    on_finish: Callable[[TrainedUnit], None],
    callbacks: Sequence[Callback] = (),
) -> None:
    """Train units together; each becomes what training it alone would give, up to rounding.

    The base is frozen and shared; the losses of the units are summed, which leaves their gradients apart. When a unit
    ends, the next job takes its slot. A run that was killed goes on from its last checkpoint and ends with the same
    bits: units sit where they sat, so that rows meet the same company, and every random choice is keyed by (seed,
    unit, step).

    Where a micro-batch does not fit the memory of the device, the step is done again with smaller ones, and so is all
    that follows. The checkpoint records it, as it does the tokens of a micro-batch that were measured.

    Args:
        model: the frozen base model, bare; the stack is seated while training and gone afterwards.
        jobs: the queue; order and company change nothing but rounding. A resumed run must be given the same jobs,
            finished ones too.
        stack: as many slots as units shall be in training at once.
        settings: how to train.
        checkpoint: file to resume from and save to; gone when the queue is empty.
        on_finish: stores a finished unit for good. It may be handed one that it has stored before: a checkpoint is
            written before units are handed over, and a run killed after that hands them over again.
        callbacks: who watches; whoever opened them closes them, since several queues may have the same.

    Raises:
        TrainError: if a loss is not finite, naming unit and step; if two jobs have one name or a job does not fit the
            stack; if the checkpoint is damaged or of another queue; if one row alone does not fit the device.
        UsageError: if the model is in training mode, or in float16.
    """
    _refuse_unsound(model, jobs)
    slots = Slots(jobs, stack, settings)
    run = _Run(Forward(model, stack, settings), slots, checkpoint, on_finish, callbacks)
    if checkpoint:
        load_checkpoint(checkpoint, slots)
    with seated(model, stack, settings), run.saved_on_interrupt():
        for callback in callbacks:
            callback.on_start(jobs)
        run.settle_budget()
        while run.turn():
            pass
    if checkpoint:
        checkpoint.unlink(missing_ok=True)


class _Run:
    """One run of a queue: what is done next depends on the state of the slots alone, so that it can be resumed."""

    def __init__(
        self,
        forward: Forward,
        slots: Slots,
        checkpoint: Path | None,
        on_finish: Callable[[TrainedUnit], None],
        callbacks: Sequence[Callback],
    ) -> None:
        self.forward, self.slots, self.checkpoint = forward, slots, checkpoint
        self.on_finish, self.callbacks = on_finish, callbacks
        self.saved_at = time.monotonic()

    def settle_budget(self) -> None:
        """Find out the tokens of a micro-batch, unless they were asked for or recorded."""
        if self.slots.max_tokens is None:
            self.slots.max_tokens, reason = find_budget(self.forward, self.slots)
        elif self.slots.max_tokens != self.slots.settings.max_tokens:
            reason = "as recorded before the interruption"
        else:
            return
        self.change_budget(reason)

    def change_budget(self, reason: str) -> None:
        """Record the tokens of a micro-batch at once: all steps from here on depend on them, after a kill too."""
        self.save()
        assert self.slots.max_tokens is not None
        for callback in self.callbacks:
            callback.on_budget(self.slots.max_tokens, reason)

    def turn(self) -> bool:
        """Do what is next: evaluate, hand over, seat, or step. False where nothing is left."""
        slots = self.slots.present()
        if due := [slot for slot in slots if slot.is_due]:
            self.evaluate(due)
        elif finished := [slot for slot in slots if slot.is_finished]:
            self.hand_over(finished)
        elif self.slots.can_fill():
            self.slots.fill()
        elif slots:
            if time.monotonic() - self.saved_at >= self.slots.settings.save_every_s:
                self.save()
            self.step(slots)
        else:
            return False
        return True

    def evaluate(self, slots: Sequence[Slot]) -> None:
        """Take the validation losses of some slots, all with the same company after a kill as before."""
        losses = self.fitting(self.forward.validation_losses, slots)
        self.slots.record(losses)
        for slot in slots:
            adapters = partial(self.slots.present_adapters, slot)
            for callback in self.callbacks:
                callback.on_eval(slot.job.name, slot.progress.step, losses[slot.index], adapters)

    def hand_over(self, slots: Sequence[Slot]) -> None:
        """Give finished units away and free their slots."""
        self.save()
        for slot in slots:
            trained = self.slots.result(slot)
            self.on_finish(trained)
            for callback in self.callbacks:
                callback.on_finish(trained)
            self.slots.free(slot)

    def step(self, slots: Sequence[Slot]) -> None:
        """One step of every unit in training."""
        started = time.monotonic()
        tokens = sum(slot.num_tokens for slot in slots)
        losses = self.fitting(self.forward.train_losses, slots)
        self.slots.step(losses)
        steps = {slot.job.name: slot.progress.step for slot in slots}
        by_name = {slot.job.name: losses[slot.index] for slot in slots}
        for callback in self.callbacks:
            callback.on_step(steps, by_name, tokens, time.monotonic() - started)

    def fitting(
        self, compute: Callable[[Sequence[Slot], int], dict[int, float]], slots: Sequence[Slot]
    ) -> dict[int, float]:
        """Losses of slots, in micro-batches that fit: smaller ones from now on where memory ran out.

        Raises:
            TrainError: if one row alone is too much.
        """
        device = self.slots.stack.parameters.device
        while True:
            before = self.slots.max_tokens
            assert before is not None
            try:
                return compute(slots, before)
            except DoesNotFit as error:
                if error.num_rows == 1:
                    self.save()
                    raise self.too_large(f"a row of {error.tokens:,} tokens", error.reason) from error
                self.slots.max_tokens = smaller_budget(before, error.tokens)
                reason = f"{before:,} did not fit the memory of {device} ({error.reason})"
            # Here, where the error is gone and with it the activations that its frames held.
            release_memory(device)
            self.change_budget(reason)

    def too_large(self, what: str, reason: str) -> TrainError:
        """The error where nothing helps any more."""
        settings, device = self.slots.settings, self.slots.stack.parameters.device
        ways = [] if settings.activation_checkpointing else ["--activation-checkpointing"]
        ways += ["a smaller --window", "a smaller --max-length", "another --device or --dtype"]
        return TrainError(
            f"{what} must fit the memory of {device}", found=reason, remedy=f"{', '.join(ways[:-1])}, or {ways[-1]}"
        )

    def save(self) -> None:
        """Write the checkpoint, if there is one to write."""
        if self.checkpoint:
            save_checkpoint(self.checkpoint, self.slots)
            self.saved_at = time.monotonic()

    @contextmanager
    def saved_on_interrupt(self) -> Iterator[None]:
        """Ctrl-C, or a callback's halt, keeps what was trained, unless it fell into the very update.

        Raises:
            TrainError: if memory ran out where smaller micro-batches are of no use, as in an update.
        """
        try:
            yield
        except (KeyboardInterrupt, Halt):
            if self.slots.is_whole:
                self.save()
            raise
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise self.too_large("the update of the experts in training", str(error)[:200]) from error


def smaller_budget(max_tokens: int, tokens: int) -> int:
    """Half the tokens of a micro-batch, as often as it takes to cut one that did not fit.

    Args:
        max_tokens: of a micro-batch, so far.
        tokens: of the one that did not fit, at least 2.
    """
    while max_tokens >= tokens:
        max_tokens //= 2
    return max_tokens


@contextmanager
def seated(model: Any, stack: FlatParameters, settings: LoopSettings) -> Iterator[None]:
    """Seat a stack in a bare model while the context lasts."""
    handles = seat(model, stack.modules)
    try:
        with (
            nullcontext() if settings.autocast else packed_weights(model),  # which are float32 and know of no autocast
            recomputed(model, stack.modules) if settings.activation_checkpointing else nullcontext(),
        ):
            yield
    finally:
        unseat(model, list(stack.modules), handles)


def _refuse_unsound(model: Any, jobs: Sequence[Job]) -> None:
    for name, number in Counter(job.name for job in jobs).items():
        if number > 1:
            raise TrainError(f"expert '{name}' must come once in a queue", found=f"{number} times")
    if model.training:
        # Dropout of the base itself would draw from one stream for all units.
        raise UsageError("the base model must be in evaluation mode", found="training mode", remedy="model.eval()")
    if model.dtype == torch.float16:
        # Gradients of activations lie below its smallest number, and would be zero without a word.
        raise UsageError(
            "the base must not be in float16 for training, whose range is too small for gradients",
            found=model.dtype,
            remedy="--dtype bfloat16, or --dtype float32",
        )
