"""The parameters of many experts as one vector, with a view per layer and factor."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.adapter import LoraFactors
from lorary.keys import keyed_generator
from lorary.lora.stacked import RowTags, StackedLora


class ExpertStack:
    """Experts of one shape being trained: all parameters in one vector, all gradients in another.

    The vector is a run of blocks, one per layer and factor, each (experts, size). Each layer's lora_a and lora_b are
    leaf tensors that view into it, and so are their gradients: autograd writes where the optimiser reads, and a
    checkpoint is a vector.

    Args:
        names: names of the experts.
        targets: (d_in, d_out) of each adapted layer, by path.
        rank: rank of every expert.
        scaling: alpha / rank.
        dtype: of the parameters; float32 beside any base but a float64 one.
        device: where the base runs.
    """

    def __init__(
        self,
        names: Sequence[str],
        targets: Mapping[str, tuple[int, int]],
        rank: int,
        scaling: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.names, self.targets, self.rank, self.scaling = tuple(names), dict(targets), rank, scaling
        self._shapes = [s for d_in, d_out in targets.values() for s in ((rank, d_in), (d_out, rank))]
        size = sum(rows * columns for rows, columns in self._shapes)
        self.parameters = torch.zeros(len(names) * size, dtype=dtype, device=device)
        self.gradient = torch.zeros_like(self.parameters)
        self.tags = RowTags(torch.arange(len(names), device=device))
        leaves = [view.detach().requires_grad_() for view in self._factors(self.parameters)]
        for leaf, gradient in zip(leaves, self._factors(self.gradient), strict=True):
            leaf.grad = gradient
        scales = torch.full((len(names),), scaling, dtype=dtype, device=device)
        self.modules = {
            path: StackedLora(leaves[2 * i], leaves[2 * i + 1], scales, self.tags, path)
            for i, path in enumerate(self.targets)
        }

    def blocks(self, vector: Tensor) -> list[Float[Tensor, "experts size"]]:
        """Views into a vector laid out as the parameters are: one row per expert in each."""
        return [view.flatten(1) for view in self._factors(vector)]

    def initialise(self, seed: int, init: str, bound_scale: float) -> None:
        """Draw lora_a from U(-s, s) with s = bound_scale / sqrt(d_in), as PEFT does for 1; lora_b is zero.

        Args:
            seed: seed of the build.
            init: `shared` (one draw per layer for the whole library) or `own` (one per expert and layer); neither
                depends on which experts are trained together.
            bound_scale: 1 for PEFT's bound, sqrt(1/3) for that of the paper's code.
        """
        for path, lora_a in zip(self.targets, self._factors(self.parameters)[::2], strict=True):
            bound = bound_scale / self.targets[path][0] ** 0.5
            for row, name in enumerate(self.names):
                key = ("init", seed, path) if init == "shared" else ("init", seed, path, name)
                draw = torch.rand(lora_a.shape[1:], generator=keyed_generator(*key), dtype=torch.float64)
                lora_a[row] = (draw.mul_(2).sub_(1) * bound).to(lora_a)

    def factors(self, row: int, vector: Tensor) -> dict[str, LoraFactors]:
        """Factors of one expert, copied to the CPU.

        Args:
            row: position of the expert.
            vector: the parameters to read, the present or the best ones.

        Returns:
            Factors by path.
        """
        own = [view[row].cpu().clone(memory_format=torch.contiguous_format) for view in self._factors(vector)]
        return {path: LoraFactors(own[2 * i], own[2 * i + 1], self.scaling) for i, path in enumerate(self.targets)}

    def _factors(self, vector: Tensor) -> list[Tensor]:
        """lora_a and lora_b of each layer in turn, as (experts, rows, columns) views into a vector."""
        num_experts = len(self.names)
        parts = vector.split([num_experts * rows * columns for rows, columns in self._shapes])
        return [part.view(num_experts, *shape) for part, shape in zip(parts, self._shapes, strict=True)]
