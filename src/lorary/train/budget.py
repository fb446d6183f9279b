"""How many tokens a micro-batch may have on a device: tried out with the heaviest rows of a queue, and measured.

A step is as fast as its micro-batches are large, and these are as large as memory allows. What a token takes depends on
the model, its attention, the vocabulary and the rows, and is not computed here but measured: micro-batches of 1,024
tokens, of twice as many and so on go forward and backward, until one would leave too little room.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch

from lorary.data.batching import input_length
from lorary.data.packing import Group
from lorary.numbers import MICRO_TOKENS
from lorary.ops.memory import release_memory
from lorary.train.forward import DoesNotFit, Forward
from lorary.train.slots import Slots

# Of the memory that is free, what a micro-batch may take. The rest is for the update, for evaluations, and for the
# pieces into which the allocator cuts its memory in time.
SHARE = 0.8


@runtime_checkable
class Meter(Protocol):
    """Measures the memory of a device."""

    def available(self) -> int:
        """Bytes that are free now."""

    def peak(self, work: Callable[[], None]) -> int:
        """Most bytes that some work takes at a time, beside what is taken before it."""


class CudaMeter:
    """Measures a CUDA device: what is free there whoever uses it, and what torch reserves for some work.

    Args:
        device: with its number.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def available(self) -> int:
        """As `Meter.available`."""
        release_memory(self.device)
        free, _ = torch.cuda.mem_get_info(self.device)
        return free

    def peak(self, work: Callable[[], None]) -> int:
        """As `Meter.peak`. Reserved memory counts, which is more than is allocated: nobody else can have it."""
        release_memory(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_reserved(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_reserved(self.device) - before


def meter_for(device: torch.device) -> Meter | None:
    """What measures the memory of a device; None where nothing does.

    On the CPU nothing does: memory is shared with all other processes there, what they take changes by the minute, and
    larger micro-batches are hardly faster.
    """
    return CudaMeter(device) if device.type == "cuda" else None


def find_budget(forward: Forward, slots: Slots) -> tuple[int, str]:
    """Measure how many tokens a micro-batch may have. What is trained is not touched.

    Args:
        forward: of the model, with the stack seated.
        slots: the queue. The rows of all its jobs count, as later ones meet the same micro-batches.

    Returns:
        The tokens: 1,024 times a power of two where that many fit, and never more than a step could use. In words, how
        they were found.
    """
    device = slots.stack.parameters.device
    meter = meter_for(device)
    if meter is None:
        return MICRO_TOKENS, f"the default, since memory is not measured on {device}"
    rows = _Rows(slots)
    limit = int(SHARE * meter.available())

    def fits(tokens: int) -> bool:
        groups = rows.groups(2 * tokens)  # more than one micro-batch, so that one of them is full
        try:
            return meter.peak(lambda: forward.try_out(groups, tokens)) <= limit
        except DoesNotFit:
            pass
        release_memory(device)
        return False

    tokens = MICRO_TOKENS
    if fits(tokens):
        while tokens < rows.most_tokens and fits(2 * tokens):
            tokens *= 2
    else:
        tokens //= 2
        while tokens > rows.longest and not fits(tokens):
            tokens //= 2
    return tokens, f"measured, as {limit / 2**30:.1f} GiB may be used for it on {device}"


class _Rows:
    """The rows of a queue, those first that take most memory: with many target tokens, whose logits are wide."""

    def __init__(self, slots: Slots) -> None:
        self.num_slots = len(slots.slots)
        dealt = [(number % self.num_slots, row) for number, job in enumerate(slots.jobs) for row in job.train]
        self._rows = sorted(dealt, key=lambda pair: (-len(pair[1].target_ids), -input_length(pair[1])))
        lengths = [input_length(row) for _, row in dealt]
        self.longest = max(lengths)
        self.most_tokens = min(sum(lengths), self.num_slots * slots.settings.batch_size * self.longest)

    def groups(self, tokens: int) -> Sequence[Group]:
        """Rows of so many tokens, or all there are, each in a slot that could train it."""
        members: dict[int, list[int]] = {}
        for number, (slot, row) in enumerate(self._rows):
            if tokens <= 0:
                break
            members.setdefault(slot, []).append(number)
            tokens -= input_length(row)
        return [
            Group(slot, 0, [self._rows[number][1] for number in numbers], range(len(numbers)))
            for slot, numbers in sorted(members.items())
        ]
