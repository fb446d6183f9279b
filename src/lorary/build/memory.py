"""Two steps of a training, measured: how fast tokens pass, and what the backward pass has to keep."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lorary.data.batching import input_length
from lorary.data.packing import micro_batches
from lorary.model.logits import can_pack
from lorary.numbers import MICRO_TOKENS
from lorary.train.callbacks import Callback
from lorary.train.flat import FlatParameters
from lorary.train.loop import train_queue
from lorary.train.slots import Slot
from lorary.train.units import Job, LoopSettings

# The first step also warms caches up.
STEPS = 2


@dataclass(frozen=True)
class Measurement:
    """What two steps showed.

    Args:
        tokens_per_s: tokens of rows (padding left out) that a training step gets through.
        computed: tokens that are computed for each of them: below 1 where prefixes are shared, above 1 for padding.
        activation_bytes: most bytes that the backward pass of a micro-batch had kept for it.
        state_bytes: parameters, gradients, moments and best parameters of all experts in training.
        max_tokens: of a micro-batch: as asked for, as measured, or as many as fitted.
    """

    tokens_per_s: float
    computed: float
    activation_bytes: int
    state_bytes: int
    max_tokens: int


class _Watch(Callback):
    """Keeps the speed of the last step, and the tokens of its micro-batches.

    Args:
        saved_bytes: what was kept for backward passes; those that only tried out how many tokens fit do not count.
        max_tokens: of a micro-batch, as asked for.
    """

    def __init__(self, saved_bytes: list[int], max_tokens: int | None) -> None:
        self.saved_bytes, self.max_tokens, self.tokens_per_s = saved_bytes, max_tokens or MICRO_TOKENS, 0.0

    def on_budget(self, max_tokens: int, reason: str) -> None:
        self.max_tokens = max_tokens
        self.saved_bytes[:] = [0]

    def on_step(self, steps: Mapping[str, int], losses: Mapping[str, float], tokens: int, seconds: float) -> None:
        self.tokens_per_s = tokens / max(seconds, 1e-9)


def measure(model: Any, jobs: Sequence[Job], stack: FlatParameters, settings: LoopSettings) -> Measurement:
    """Train the first jobs for two steps and throw the result away.

    Args:
        model: the frozen base model, bare.
        jobs: the queue; as many as the stack has slots are tried.
        stack: for them.
        settings: how to train.

    Returns:
        What was measured, on this device.
    """
    short = [
        replace(job, num_steps=STEPS, val=job.val[:1], val_tasks=job.val_tasks[:1]) for job in jobs[: stack.num_slots]
    ]
    loop = replace(settings, num_evals=1, patience=None)
    with _kept_bytes([*model.parameters(), stack.parameters]) as saved_bytes:
        watch = _Watch(saved_bytes, settings.max_tokens)
        train_queue(model, short, stack, loop, on_finish=lambda trained: None, callbacks=[watch])
    vectors = 5  # parameters, gradient, two moments, the best parameters
    state = vectors * stack.parameters.numel() * stack.parameters.element_size()
    computed = _computed(model, short, loop, watch.max_tokens)
    return Measurement(watch.tokens_per_s, computed, max(saved_bytes), state, watch.max_tokens)


def _computed(model: Any, jobs: Sequence[Job], settings: LoopSettings, max_tokens: int) -> float:
    """Tokens computed for each token of the rows of a first step."""
    groups = [group for slot, job in enumerate(jobs) for group in Slot(slot, job, settings).train_groups()]
    share = can_pack(model) and settings.dropout == 0
    micros = micro_batches(groups, max_tokens, share_prefix=share)
    fed = sum(input_length(row) for group in groups for row in group.rows)
    return sum(micro.batch.input_ids.numel() for micro in micros) / fed


@contextmanager
def _kept_bytes(excluded: Sequence[Tensor]) -> Iterator[list[int]]:
    """Collects, for every backward pass, the bytes that were kept for it, parameters left out."""
    parameters = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    sums: list[int] = [0]
    saved: dict[int, int] = {}
    is_backward = False

    def pack(tensor: Tensor) -> Tensor:
        nonlocal is_backward
        if is_backward:
            saved.clear()
            is_backward = False
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        nonlocal is_backward
        if not is_backward:
            sums.append(sum(saved.values()))
            is_backward = True
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield sums
