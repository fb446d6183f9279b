"""The experts of a library, stacked layer by layer for one base model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from lorary.adapter import Adapter, LoraFactors
from lorary.lora.gated import GatedLora
from lorary.lora.seat import find_linear, linear_shape
from lorary.route.arrow import arrow_prototypes


@dataclass(frozen=True)
class SeatedLayer:
    """One routed linear layer: its experts as positions in the library's order, and how clear their prototypes are."""

    experts: tuple[int, ...]
    alive: Tensor  # (experts of this layer,) bool
    gap: Tensor  # (experts of this layer,) σ2/σ1
    lora: GatedLora


def build_layers(model: nn.Module, adapters: Iterable[Adapter]) -> dict[str, SeatedLayer]:
    """Stack all experts of each linear layer, in the order in which the model holds its layers.

    Args:
        model: the base model, unchanged.
        adapters: the experts, in canonical order. They are gone through twice, first for their shapes and then for
            their factors, so that a lazy collection never holds more than one adapter beside the stacks.

    Returns:
        The seated layers by path.

    Raises:
        AdapterError: if an adapter does not fit the model.
    """
    members: dict[str, list[tuple[int, int]]] = {}
    for position, adapter in enumerate(adapters):
        for path, factors in adapter:
            find_linear(model, path, adapter.name, factors.d_in, factors.d_out)
            members.setdefault(path, []).append((position, factors.rank))
    # Duplicates stay in: a tied layer that two paths lead to is refused when it is seated, not dropped.
    order = [name for name, _ in model.named_modules(remove_duplicate=False) if name in members]
    stacks = {path: _Stack(model.get_submodule(path), members[path]) for path in order}
    for position, adapter in enumerate(adapters):
        for path, factors in adapter:
            stacks[path].put(position, factors)
    return {path: stack.seat() for path, stack in stacks.items()}


class _Stack:
    """Room for the factors of one layer's experts, filled one by one.

    Args:
        layer: the linear layer.
        members: (position in the library, rank) of each expert that has the layer.
    """

    def __init__(self, layer: nn.Module, members: Sequence[tuple[int, int]]) -> None:
        shape = linear_shape(layer)
        assert shape is not None
        d_in, d_out = shape
        dtype = _compute_dtype(layer)
        # Some quantised layers hold buffers only.
        self.device = next(chain(layer.parameters(), layer.buffers())).device
        self.experts = tuple(position for position, _ in members)
        self.ranks = torch.tensor([rank for _, rank in members])
        ends = self.ranks.cumsum(0).tolist()
        self.slices = {position: slice(end - rank, end) for (position, rank), end in zip(members, ends, strict=True)}
        self.down = torch.zeros(ends[-1] + len(members), d_in, dtype=dtype)
        self.up = torch.zeros(ends[-1], d_out, dtype=dtype)

    def put(self, position: int, factors: LoraFactors) -> None:
        """Copy the factors of one expert into its place, its scaling folded into lora_b."""
        rows = self.slices[position]
        self.down[rows] = factors.lora_a.to(self.down)
        self.up[rows] = factors.lora_b.mT.to(self.up) * factors.scaling

    def seat(self) -> SeatedLayer:
        """Compute the prototypes and make the module."""
        experts = len(self.experts)
        prototypes, gap = self.down[-experts:], torch.zeros(experts, dtype=torch.float64)
        starts = self.ranks.cumsum(0) - self.ranks
        for rank in self.ranks.unique().tolist():  # one batched factorisation for all experts of a rank
            same = (self.ranks == rank).nonzero().squeeze(1)
            rows = starts[same][:, None] + torch.arange(rank)  # (experts of this rank, rank)
            found, gap[same] = arrow_prototypes(self.down[rows], self.up[rows].mT)
            prototypes[same] = found.to(prototypes)
        expert_of_rank = torch.arange(experts).repeat_interleave(self.ranks)
        lora = GatedLora(self.down.to(self.device), self.up.to(self.device), expert_of_rank.to(self.device))
        return SeatedLayer(self.experts, prototypes.any(dim=1).to(self.device), gap, lora)


def _compute_dtype(layer: nn.Module) -> torch.dtype:
    """float64 beside a float64 layer, else float32: adapters are small, and scores in half precision choose others."""
    double = any(p.dtype == torch.float64 for p in layer.parameters(recurse=False))
    return torch.float64 if double else torch.float32
