"""Contrast's data: mean and deviation of each expert's score over the prompts of all experts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorary.data.template import Example
from lorary.library.store import Library
from lorary.model.layers import build_layers
from lorary.model.prompt_scores import checked_moments, watch_prompts
from lorary.prepare.measure import MeasureContext, Tensors
from lorary.route import ROUTERS


def pooled_contrast(context: MeasureContext, examples: Mapping[str, Sequence[Example]]) -> Mapping[str, Tensors]:
    """The moments of every expert, over the prompts of all experts.

    No sample of one expert can be kept for the next time: another adapter scores other things on the same prompts, and
    prompts themselves do not belong into a library that may be handed on.
    """
    prompts = [example.prompt_ids for by_expert in examples.values() for example in by_expert]
    return pooled_moments(context.base.model, context.library, prompts)


def pooled_moments(model: Any, library: Library, prompts: Sequence[Sequence[int]]) -> dict[str, dict[str, Tensor]]:
    """Mean and deviation of each expert's mean projection score over a prompt, over prompts of all experts.

    The bare base runs; all experts are scored and none acts. The library's default router plays no part.

    Args:
        model: the base model.
        library: the experts, which fit it.
        prompts: token ids, those of all experts together.

    Returns:
        By expert and path of the layer (2,), in the dtype of the experts; mean 0 and deviation 1 where nothing is
        ever measured: for an expert that does nothing there, and in a layer that no decision for a request looks at
        (an output head).

    Raises:
        TaskError: if an expert scores the same on all prompts, naming it and the layer.
    """
    names = library.names()
    shapes = {name: library.shapes(name) for name in names}
    layers = build_layers(model, (library.get(name) for name in names), shapes=shapes)
    counts = {path: _RunningMoments(len(layer.experts)) for path, layer in layers.items()}
    watch_prompts(model, ROUTERS["contrast"], layers, prompts, lambda path, _prompts, means: counts[path].add(means))
    by_expert: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for path, layer in layers.items():
        seated, count = [names[position] for position in layer.experts], counts[path]
        measured = layer.alive.cpu() & (count.number > 0)
        moments = checked_moments(count.mean, count.deviation, measured, path, seated, "raise --rows")
        for name, pair in zip(seated, moments, strict=True):
            by_expert[name][path] = pair.to(layer.lora.up.dtype)
    return by_expert


class _RunningMoments:
    """Mean and deviation of numbers that come batch by batch; nothing of the size of all of them is kept.

    Args:
        width: how many columns of numbers there are.
    """

    def __init__(self, width: int) -> None:
        self.number = 0
        self.mean = self._squares = torch.zeros(width, dtype=torch.float64)

    @property
    def deviation(self) -> Tensor:
        """(columns,), with Bessel's correction."""
        return (self._squares / max(self.number - 1, 1)).sqrt()

    def add(self, values: Tensor) -> None:
        """Count (numbers, columns)."""
        before, self.number = self.number, self.number + len(values)
        batch_mean = values.mean(dim=0)
        gap = batch_mean - self.mean
        # Squared deviations of the two parts from their own means, and what their means lie apart (Chan et al.).
        apart = gap.square() * before * len(values) / self.number
        self._squares = self._squares + (values - batch_mean).square().sum(dim=0) + apart
        self.mean = self.mean + gap * len(values) / self.number
