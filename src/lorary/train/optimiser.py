"""AdamW over many experts at once, each clipped by the norm of its own gradient.

The usual tools clip and step whole parameters. Here every parameter holds all experts, and each must behave as if it
were alone. AdamW is element-wise, so that only the norm has to be taken expert by expert.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class OptimiserSettings:
    """AdamW with linear warm-up and decay.

    Args:
        learning_rate: peak learning rate.
        num_steps: steps of the whole training.
        warmup: share of the steps over which the learning rate rises.
        clip: largest L2 norm of one expert's gradient.
        weight_decay: decoupled weight decay.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
    """

    learning_rate: float
    num_steps: int
    warmup: float = 0.06
    clip: float = 0.1
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0: linear up over the warm-up, then linear down to 0 after the last."""
        warm = math.ceil(self.warmup * self.num_steps)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * (self.num_steps - step) / max(1, self.num_steps - warm)


class ExpertwiseAdamW:
    """AdamW whose state is two vectors beside the parameters.

    Args:
        parameters: all parameters of all experts, updated in place.
        settings: the schedule and constants.
    """

    def __init__(self, parameters: Tensor, settings: OptimiserSettings) -> None:
        self.parameters, self.settings = parameters, settings
        self.first = torch.zeros_like(parameters)
        self.second = torch.zeros_like(parameters)

    def step(self, gradient: Tensor, blocks: Sequence[Tensor], step: int) -> Float[Tensor, " experts"]:
        """Clip the gradient of each expert by its own norm and update all of them.

        Args:
            gradient: summed over the micro-batches of the step, laid out as the parameters; scaled in place.
            blocks: views that cover the gradient, each (experts, size).
            step: number of the step, from 0.

        Returns:
            The norm of each expert's gradient before clipping.
        """
        s = self.settings
        norms = torch.stack([torch.linalg.vector_norm(block, dim=1) for block in blocks]).norm(dim=0)
        scale = (s.clip / (norms + 1e-6)).clamp_max(1.0)[:, None]
        for block in blocks:
            block.mul_(scale)
        rate = s.rate_at(step)
        self.parameters.mul_(1.0 - rate * s.weight_decay)
        self.first.lerp_(gradient, 1.0 - s.beta1)
        self.second.mul_(s.beta2).addcmul_(gradient, gradient, value=1.0 - s.beta2)
        correction1, correction2 = 1.0 - s.beta1 ** (step + 1), 1.0 - s.beta2 ** (step + 1)
        denominator = (self.second / correction2).sqrt_().add_(s.eps)
        self.parameters.addcdiv_(self.first, denominator, value=-rate / correction1)
        return norms
