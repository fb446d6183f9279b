"""Seeing what a routed model chose: routing weights per token, layer and expert."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorary.errors import UsageError
from lorary.model.attach import Seating, seating


class Trace:
    """Routing weights of every forward pass inside `with lorary.trace(model)`.

    Experts that a layer lacks have weight 0 there. A router with fixed weights decides nothing and records nothing.
    """

    def __init__(self, state: Seating) -> None:
        self.experts = state.experts
        self._seated = {path: layer.experts for path, layer in state.layers.items()}
        self._steps: dict[str, list[Tensor]] = {path: [] for path in state.layers}
        self._masks: list[Tensor | None] = []

    @property
    def layers(self) -> list[str]:
        """Paths of the routed layers that recorded something, in the model's order."""
        return [path for path, steps in self._steps.items() if steps]

    def weights(self, layer: str) -> Tensor:
        """Routing weights of one layer over all forward passes, (batch, seq, experts), float32, on the CPU.

        Raises:
            UsageError: if the layer is not routed, or nothing was recorded.
        """
        if layer not in self._steps:
            raise UsageError("the layer must be a routed one", found=layer, remedy=f"one of {list(self._steps)}")
        if not self._steps[layer]:
            raise UsageError(
                f"layer '{layer}' must have run inside the trace under a router that looks at tokens",
                found="no recorded weights",
            )
        local = torch.cat(self._steps[layer], dim=1)
        full = local.new_zeros(*local.shape[:-1], len(self.experts))
        full[..., list(self._seated[layer])] = local
        return full

    def stacked(self) -> Tensor:
        """Routing weights of all recorded layers, (layers, batch, seq, experts)."""
        return torch.stack([self.weights(layer) for layer in self.layers])

    def mask(self) -> Tensor | None:
        """(batch, seq) bool, False at padding; None where no pass was given an attention mask."""
        masks = [mask for mask in self._masks if mask is not None]
        if not masks:
            return None
        # A cached step sees the mask of the whole row, of which its own tokens are the last.
        return torch.cat([masks[0], *(mask[:, -1:] for mask in masks[1:])], dim=1).bool()

    def usage(self) -> dict[str, float]:
        """Mean routing weight of each expert over layers and tokens, padding left out; sums to at most 1."""
        stacked = self.stacked()
        mask = self.mask()
        kept = stacked if mask is None else stacked[:, mask]
        mean = kept.reshape(-1, len(self.experts)).mean(dim=0)
        return dict(zip(self.experts, mean.tolist(), strict=True))

    def _record(self, path: str, weights: Tensor) -> None:
        batched = weights if weights.dim() == 3 else weights.unsqueeze(0)
        self._steps[path].append(batched.float().cpu())


@contextmanager
def trace(model: Any) -> Iterator[Trace]:
    """Record routing weights per token, layer and expert.

    Args:
        model: a routed model.

    Yields:
        The trace, filled by every forward pass inside the block, cached generation included.

    Raises:
        UsageError: if no experts are seated in the model.
    """
    state = seating(model)
    recorded = Trace(state)

    def note_mask(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        recorded._masks.append(mask.detach().cpu() if isinstance(mask, Tensor) and mask.dim() == 2 else None)

    handle = model.register_forward_pre_hook(note_mask, with_kwargs=True)
    for path, layer in state.layers.items():
        layer.lora.record = partial(recorded._record, path)
    try:
        yield recorded
    finally:
        handle.remove()
        for layer in state.layers.values():
            layer.lora.record = None
