"""Seeing what a routed model chose: routing weights per token, layer and expert."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lorary.errors import UsageError
from lorary.lora.context import inside, is_inside, new_block
from lorary.model.changing import CHANGING
from lorary.model.probe import cache_of, cached_length
from lorary.model.seating import Seating, seating
from lorary.tabular import ResultTable


class Trace:
    """Routing weights of every forward pass inside `with lorary.trace(model)`.

    Passes are joined along `seq`, so that cached generation reads as one row of positions; they must have one batch
    size. What a cache forgets again, as it does a draft that is not accepted, goes from the trace too. Under beam
    search a row is a place in the beam: it is not followed when beams change places. Experts that a layer lacks have
    weight 0 there. A router with fixed weights decides nothing and records nothing.
    """

    def __init__(self, state: Seating) -> None:
        self.experts = state.experts
        self._seated = {path: layer.experts for path, layer in state.layers.items()}
        self._steps: dict[str, list[Tensor]] = {path: [] for path in state.layers}
        self._masks: dict[str, list[Tensor]] = {path: [] for path in state.layers}
        self._mask: Tensor | None = None
        self._segment: tuple[int | None, int] = (None, 0)

    def __repr__(self) -> str:
        if not self.layers:
            return f"Trace(nothing recorded in {len(self._steps)} layers)"
        steps = self._steps[self.layers[0]]
        shape = f"batch {len(steps[0])}, seq {sum(step.shape[1] for step in steps)}"
        return f"Trace({len(self.layers)} layers, {shape}, experts {list(self.experts)})"

    def _repr_html_(self) -> str:
        usage = self.usage() if self.layers else {}
        return ResultTable(repr(self), ("expert", "mean weight"), list(usage.items())).to_html()

    @property
    def layers(self) -> list[str]:
        """Paths of the routed layers that recorded something, in the model's order."""
        return [path for path, steps in self._steps.items() if steps]

    def weights(self, layer: str) -> Tensor:
        """Routing weights of one layer over all forward passes, (batch, seq, experts), float32, on the CPU.

        Raises:
            UsageError: if the layer is not routed, nothing was recorded, or the passes differ in batch size.
        """
        if layer not in self._steps:
            raise UsageError("the layer must be a routed one", found=layer, remedy=f"one of {list(self._steps)}")
        local = _join(self._steps[layer], layer)
        full = local.new_zeros(*local.shape[:-1], len(self.experts))
        full[..., list(self._seated[layer])] = local
        return full

    def stacked(self) -> Tensor:
        """Routing weights of all recorded layers, (layers, batch, seq, experts).

        Raises:
            UsageError: if nothing was recorded, the passes differ in batch size, or the layers in what they were given.
        """
        weights = {layer: self.weights(layer) for layer in self._recorded()}
        first = next(iter(weights))
        for layer, layer_weights in weights.items():
            if layer_weights.shape != weights[first].shape:
                raise UsageError(
                    "layers must be given the same tokens to be stacked",
                    found=f"{layer_weights.shape[1]} at {layer}, {weights[first].shape[1]} at {first}",
                    remedy="take weights(layer) of each layer",
                )
        return torch.stack(list(weights.values()))

    def mask(self) -> Tensor:
        """(batch, seq) bool, False at padding; a pass that was given no attention mask of tokens has no padding.

        Raises:
            UsageError: if nothing was recorded, or the passes differ in batch size.
        """
        layer = self._recorded()[0]
        return _join(self._masks[layer], layer)

    def usage(self) -> dict[str, float]:
        """Mean routing weight of each expert over tokens and over the layers that it has, padding left out.

        It sums to at most 1 where all experts have the same layers. One without a layer that recorded something has 0.

        Raises:
            UsageError: if nothing was recorded, or the passes differ in batch size.
        """
        sums, num_layers = torch.zeros(len(self.experts)), torch.zeros(len(self.experts))
        # Layer by layer: one inside the output head is given the last token alone in generation.
        for path in self._recorded():
            sums += self.weights(path)[_join(self._masks[path], path)].mean(dim=0)
            num_layers[list(self._seated[path])] += 1
        return dict(zip(self.experts, (sums / num_layers.clamp_min(1)).tolist(), strict=True))

    def _recorded(self) -> list[str]:
        if not self.layers:
            _join([], next(iter(self._steps)))
        return self.layers

    def _begin(self, arguments: Mapping[str, Any]) -> None:
        """A pass begins: note its padding, and forget what its cache has forgotten since the pass before.

        Args:
            arguments: its arguments, by name.
        """
        mask, cache = arguments.get("attention_mask"), cache_of(arguments)
        self._mask = mask.detach().bool().cpu() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        length = cached_length(cache)
        num_recorded = max((sum(step.shape[1] for step in steps) for steps in self._steps.values()), default=0)
        cache_id, ahead = self._segment
        if cache_id != id(cache) or not length:  # other text: what was recorded before it stays
            self._segment = (None if cache is None else id(cache), num_recorded - length)
        elif (forgotten := num_recorded - ahead - length) > 0:
            for parts in (*self._steps.values(), *self._masks.values()):
                _cut(parts, forgotten)

    def _record(self, path: str, weights: Tensor) -> None:
        batched = weights if weights.dim() == 3 else weights.unsqueeze(0)
        self._steps[path].append(batched.float().cpu())
        shape, mask = batched.shape[:2], self._mask
        if mask is None:
            self._masks[path].append(torch.ones(shape, dtype=torch.bool))
            return
        # A cached pass is given the mask of the whole row, of which its own tokens are the last.
        seq = shape.numel() // mask.shape[0]
        self._masks[path].append(mask[:, -seq:].reshape(shape))


@contextmanager
def trace(model: Any) -> Iterator[Trace]:
    """Record routing weights per token, layer and expert, of the passes of the running thread or asyncio task.

    Args:
        model: a routed model.

    Yields:
        The trace, filled by every forward pass inside the block, cached generation included.

    Raises:
        UsageError: if no experts are seated in the model.
    """
    state, block = seating(model), new_block()
    parameters = list(signature(model.forward).parameters)

    def begin(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] = MappingProxyType({})) -> None:
        # A pass of another thread may lack keywords (`lorary.model.passes`), and a copy of the model has this hook too.
        if module is model and is_inside(block):
            recorded._begin({**dict(zip(parameters, args, strict=False)), **kwargs})

    def record(path: str, weights: Tensor) -> None:
        if is_inside(block):
            recorded._record(path, weights)

    with CHANGING:
        recorded = Trace(state)
        handle = model.register_forward_pre_hook(begin, with_kwargs=True)
        recorders = {path: partial(record, path) for path in state.layers}
        for path, layer in state.layers.items():
            layer.lora.recorders.append(recorders[path])
    try:
        with inside(block):
            yield recorded
    finally:
        handle.remove()
        for path, layer in state.layers.items():
            layer.lora.recorders.remove(recorders[path])


def _cut(passes: list[Tensor], number: int) -> None:
    """Take positions away from the end of what passes recorded."""
    while passes and number >= passes[-1].shape[1]:
        number -= passes.pop().shape[1]
    if passes and number:
        passes[-1] = passes[-1][:, :-number]


def _join(passes: Sequence[Tensor], layer: str) -> Tensor:
    """Join what passes recorded along `seq`."""
    if not passes:
        raise UsageError(
            f"layer '{layer}' must have run inside the trace under a router that looks at tokens",
            found="no recorded weights",
        )
    batch_sizes = sorted({len(step) for step in passes})
    if len(batch_sizes) > 1:
        raise UsageError(
            "all forward passes inside one trace must have one batch size",
            found=batch_sizes,
            remedy="open a trace for each batch",
        )
    return torch.cat(list(passes), dim=1)
