"""The parameters of the units in training as one vector, their gradients as another."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lorary.keys import keyed_generator
from lorary.lora.stacked import RowTags
from lorary.train.units import Job, Trained


class FlatParameters(ABC):
    """Slot after slot, each a run of blocks, one per tensor: a stack of units in training.

    `vector.view(num_slots, -1)[slot]` is all that belongs to one slot, so that a unit is stepped, clipped, stored and
    replaced without a look at the others, and a checkpoint is a vector. The tensors are leaves that view into
    `parameters`; their gradients are added to `gradient` as soon as they are there. `tags` are shared by all modules.

    Args:
        num_slots: units that can be in training at once.
        shapes: of each tensor. The slots are its first axis, which may be left out where there is one slot.
        dtype: of the parameters; float32 beside any base except a float64 one.
        device: where the base runs.
    """

    modules: Mapping[str, nn.Module]  # seated beside the layers, by path

    def __init__(
        self, num_slots: int, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_slots, self._shapes = num_slots, list(shapes)
        self.parameters = torch.zeros(sum(map(math.prod, shapes)), dtype=dtype, device=device)
        self.gradient = torch.zeros_like(self.parameters)
        self.tags = RowTags()
        self.leaves = [view.detach().requires_grad_() for view in self.tensors(self.parameters)]
        for leaf, gradient in zip(self.leaves, self.tensors(self.gradient), strict=True):
            # Not as the leaf's own .grad: autograd wants that contiguous.
            leaf.register_post_accumulate_grad_hook(partial(_move_gradient, gradient))

    def clear_gradient(self) -> None:
        """Forget all gradients, also those that a backward pass which broke off has left at the leaves."""
        self.gradient.zero_()
        for leaf in self.leaves:
            leaf.grad = None

    def blocks(self, vector: Tensor) -> list[Tensor]:
        """Views (slots, size) that cover a vector, one per tensor, in the order of each slot's parameters."""
        sizes = [math.prod(shape) // self.num_slots for shape in self._shapes]
        return list(vector.view(self.num_slots, -1).split(sizes, dim=1))

    def tensors(self, vector: Tensor) -> list[Tensor]:
        """The same views in the shapes of the tensors."""
        return [block.view(shape) for block, shape in zip(self.blocks(vector), self._shapes, strict=True)]

    def rate_scales(self) -> list[float | None] | None:
        """For each block a factor on the learning rate; such a block is not decayed. None: the plain rate, decayed."""
        return None

    @abstractmethod
    def fill(self, slot: int, job: Job, seed: int, init: str, init_scale: float) -> None:
        """Overwrite all of a slot's parameters with the initial ones of a job, and set what else it needs (scaling).

        Args:
            slot: which is overwritten; 0 where there is only one.
            job: whose initial parameters.
            seed: seed of the build.
            init: `shared` (one draw per layer and rank for the whole library) or `own` (one per expert and layer);
                neither depends on who else is trained.
            init_scale: 1 for PEFT's bound, sqrt(1/3) for that of the paper's code.

        Raises:
            TrainError: if the job does not fit the stack.
        """

    @abstractmethod
    def result(self, slot: int, job: Job, vector: Tensor) -> Trained:
        """What a vector holds for the job in a slot, copied to the CPU.

        Args:
            slot: where it sits.
            job: whose it is.
            vector: laid out as the parameters: the present or the best ones.
        """


def uniform(shape: Sequence[int], bound: float, *key: object) -> Tensor:
    """A float64 draw from U(-bound, bound) that depends on the key alone."""
    draw = torch.rand(tuple(shape), generator=keyed_generator(*key), dtype=torch.float64)
    return draw.mul_(2).sub_(1).mul_(bound)


def _move_gradient(into: Tensor, leaf: Tensor) -> None:
    assert leaf.grad is not None
    into.add_(leaf.grad)
    leaf.grad = None
