"""Adapters seen layer by layer: which of them adapt a layer, and one scaling for those that are mixed there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.adapter import LoraFactors
from lorary.errors import AdapterError

Modules = Mapping[str, LoraFactors]  # by the path of the layer


@dataclass(frozen=True)
class MixedLayer:
    """The factors of one layer of those adapters that have it.

    Args:
        members: position of each such adapter among all.
        factors: of each, in a common dtype of at least 32 bits.
    """

    members: tuple[int, ...]
    factors: tuple[LoraFactors, ...]

    @property
    def scaling(self) -> float:
        """The scaling that all share; 1 where they differ or it is not above 0, and each lora_b takes its own in."""
        scalings = {factors.scaling for factors in self.factors}
        return max(scalings) if len(scalings) == 1 and max(scalings) > 0 else 1.0

    @property
    def num_ranks(self) -> int:
        """Sum of the ranks."""
        return sum(factors.rank for factors in self.factors)

    @property
    def has_one_rank(self) -> bool:
        """Whether the factors can be stacked."""
        return len({factors.rank for factors in self.factors}) == 1

    def stacked(self) -> tuple[Float[Tensor, "experts rank d_in"], Float[Tensor, "experts d_out rank"]]:
        """lora_a and lora_b of all members, to be scaled by `scaling`; all ranks must be equal."""
        return torch.stack([f.lora_a for f in self.factors]), torch.stack(self._ups())

    def concatenated(self) -> tuple[Float[Tensor, "ranks d_in"], Float[Tensor, "d_out ranks"]]:
        """lora_a and lora_b of all members with their rank axes concatenated, to be scaled by `scaling`."""
        return torch.cat([f.lora_a for f in self.factors]), torch.cat(self._ups(), dim=1)

    def by_rank(self, weights: Float[Tensor, "*axes experts"]) -> Float[Tensor, "*axes ranks"]:
        """One weight per member as one per rank of the concatenation."""
        sizes = torch.tensor([factors.rank for factors in self.factors], device=weights.device)
        return weights.repeat_interleave(sizes, dim=-1)

    def bias(self, weights: Float[Tensor, " experts"]) -> Float[Tensor, " d_out"] | None:
        """The weighted sum of the members' biases, to be scaled by `scaling`; None where no member has one."""
        parts = [
            weight * (f.scaling / self.scaling) * f.bias.to(f.lora_b)
            for weight, f in zip(weights, self.factors, strict=True)
            if f.bias is not None
        ]
        return torch.stack(parts).sum(dim=0) if parts else None

    def _ups(self) -> list[Tensor]:
        return [f.lora_b * (f.scaling / self.scaling) for f in self.factors]


def mixed_layers(adapters: Sequence[Modules]) -> dict[str, MixedLayer]:
    """All layers that any of several adapters has.

    Args:
        adapters: factors by path, of each.

    Returns:
        By path, in the order in which layers are first met.

    Raises:
        AdapterError: if a layer has different shapes in two adapters.
    """
    members: dict[str, list[tuple[int, LoraFactors]]] = {}
    for number, modules in enumerate(adapters):
        for path, factors in modules.items():
            members.setdefault(path, []).append((number, factors))
    return {path: _layer(path, entries) for path, entries in members.items()}


def _layer(path: str, entries: Sequence[tuple[int, LoraFactors]]) -> MixedLayer:
    shapes = {(factors.d_in, factors.d_out) for _, factors in entries}
    if len(shapes) > 1:
        raise AdapterError(
            f"layer '{path}' must have one (d_in, d_out) in all adapters that are put together", found=sorted(shapes)
        )
    dtype = torch.float32
    for _, factors in entries:
        dtype = torch.promote_types(dtype, factors.lora_a.dtype)
    members, layer_factors = zip(*entries, strict=True)
    return MixedLayer(
        members, tuple(replace(f, lora_a=f.lora_a.to(dtype), lora_b=f.lora_b.to(dtype)) for f in layer_factors)
    )
