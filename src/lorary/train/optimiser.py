"""AdamW over the slots of a stack, each as if it were alone: own steps, own schedule, clipped by its own norm.

The usual tools clip and step whole parameters. Here one vector holds all units, slot after slot, and each slot is
stepped by itself: its bits do not depend on who sits beside it, and a slot that is free stays as it is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class OptimiserSettings:
    """AdamW with linear warm-up and decay.

    Args:
        learning_rate: peak learning rate.
        warmup: share of a unit's steps over which the learning rate rises.
        clip: largest L2 norm of one unit's gradient.
        weight_decay: decoupled weight decay.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
    """

    learning_rate: float
    warmup: float = 0.06
    clip: float = 0.1
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def rate_at(self, step: int, num_steps: int) -> float:
        """Learning rate of a step, counted from 0: linear up over the warm-up, then linear down to 0 after the last."""
        warm = math.ceil(self.warmup * num_steps)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * (num_steps - step) / max(1, num_steps - warm)


class SlotwiseAdamW:
    """AdamW whose state is two vectors beside the parameters.

    Args:
        parameters: flat, slot after slot; updated in place.
        gradient: laid out alike; scaled in place.
        num_slots: equal parts of the vectors.
        settings: the schedule and constants.
        scales: (size, factor) of the blocks of a slot, in order: a factor on the learning rate of a block that is not
            decayed, or None for the plain rate with decay; no blocks stand for one plain one.
    """

    def __init__(
        self,
        parameters: Tensor,
        gradient: Tensor,
        num_slots: int,
        settings: OptimiserSettings,
        scales: Sequence[tuple[int, float | None]] = (),
    ) -> None:
        self.settings = settings
        self.first, self.second = torch.zeros_like(parameters), torch.zeros_like(parameters)
        vectors = (parameters, gradient, self.first, self.second)
        self._slots = list(zip(*(vector.view(num_slots, -1) for vector in vectors), strict=True))
        self._spans = _spans(scales or [(parameters.numel() // num_slots, None)])

    def reset(self, slot: int) -> None:
        """Forget the moments of a slot: a new unit sits there."""
        for moments in self._slots[slot][2:]:
            moments.zero_()

    def step(self, slot: int, step: int, num_steps: int) -> Float[Tensor, ""]:
        """Clip the gradient of one slot by its own norm and update its parameters.

        Args:
            slot: which.
            step: number of its step, from 0.
            num_steps: steps of its whole training.

        Returns:
            The norm of its gradient before clipping.
        """
        s = self.settings
        parameters, gradient, first, second = self._slots[slot]
        norm = torch.linalg.vector_norm(gradient)
        gradient.mul_((s.clip / (norm + 1e-6)).clamp_max(1.0))
        first.lerp_(gradient, 1.0 - s.beta1)
        second.mul_(s.beta2).addcmul_(gradient, gradient, value=1.0 - s.beta2)
        denominator = (second / (1.0 - s.beta2 ** (step + 1))).sqrt_().add_(s.eps)
        for start, stop, factor in self._spans:
            rate = s.rate_at(step, num_steps) * (1.0 if factor is None else factor)
            block = parameters[start:stop]
            if factor is None:
                block.mul_(1.0 - rate * s.weight_decay)
            block.addcdiv_(first[start:stop], denominator[start:stop], value=-rate / (1.0 - s.beta1 ** (step + 1)))
        return norm


def _spans(scales: Sequence[tuple[int, float | None]]) -> list[tuple[int, int, float | None]]:
    """(start, stop, factor) of the runs of blocks that share a factor."""
    spans = []
    start = 0
    for factor, run in groupby(scales, key=lambda block: block[1]):
        stop = start + sum(size for size, _ in run)
        spans.append((start, stop, factor))
        start = stop
    return spans
