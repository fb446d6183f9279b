"""Contrast's data: mean and deviation of each expert's score over the prompts of all experts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorary.data.template import Example
from lorary.errors import TaskError
from lorary.library.store import Library
from lorary.lora.gate import LayerInput
from lorary.lora.seat import seat, unseat
from lorary.model.features import decoder_of, prompt_batches
from lorary.model.gates import ScoreGate
from lorary.model.layers import SeatedLayer, build_layers
from lorary.model.row_gates import rows_of
from lorary.ops.choose import Choice
from lorary.prepare.measure import MeasureContext, Tensors
from lorary.route import ROUTERS

# Deviations below this part of the mean are the rounding of equal scores.
_ROUNDING = 1e-6


def pooled_contrast(context: MeasureContext, examples: Mapping[str, Sequence[Example]]) -> Mapping[str, Tensors]:
    """The moments of every expert, over the prompts of all experts.

    No sample of one expert can be kept for the next time: another adapter scores other things on the same prompts, and
    prompts themselves do not belong into a library that may be handed on.
    """
    prompts = [example.prompt_ids for by_expert in examples.values() for example in by_expert]
    return pooled_moments(context.base.model, context.library, prompts)


@torch.no_grad()
def pooled_moments(model: Any, library: Library, prompts: Sequence[Sequence[int]]) -> dict[str, dict[str, Tensor]]:
    """Mean and deviation of each expert's mean projection score over a prompt, over prompts of all experts.

    The bare base runs; all experts are seated and none acts. The library's default router plays no part.

    Args:
        model: the bare base model, changed in place while this runs.
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
    watches = {path: _Watch(layer) for path, layer in layers.items()}
    for path, layer in layers.items():
        layer.lora.route_by(watches[path], "outputs")
    handles = seat(model, {path: layer.lora for path, layer in layers.items()})
    try:
        for _, ids, real in prompt_batches(model, prompts):
            for watch in watches.values():
                watch.real = real
            decoder_of(model)(input_ids=ids, use_cache=False)
    finally:
        unseat(model, list(layers), handles)
    by_expert: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for path, layer in layers.items():
        seated = [names[position] for position in layer.experts]
        for name, moments in zip(seated, watches[path].moments(path, seated), strict=True):
            by_expert[name][path] = moments.to(layer.lora.up.dtype)
    return by_expert


class _Watch:
    """A gate that counts the mean score of each expert over each prompt, and leaves the layer as it is.

    Args:
        layer: that it is for.
    """

    reads_prototypes, reads_z, most, quick = False, True, 1, None

    def __init__(self, layer: SeatedLayer) -> None:
        everyone = torch.ones(len(layer.experts), dtype=torch.bool)
        norm = ROUTERS["contrast"].input_norm
        self._scored = ScoreGate(ROUTERS["projection"], layer, Choice(), everyone, input_norm=norm)
        self.real = torch.empty(0)
        self._count = 0
        self._mean = self._squares = torch.zeros(len(layer.experts), dtype=torch.float64)

    def __call__(self, inputs: LayerInput) -> None:
        batch, seq = rows_of(inputs)
        real = self.real.to(inputs.x.device)[..., None]
        scores = self._scored.scores(inputs).view(batch, seq, -1).double()
        sums = scores.masked_fill(~(real & self._scored.alive), 0.0).sum(dim=1)
        self._add((sums / real.sum(dim=1)).cpu())

    def _add(self, means: Tensor) -> None:
        """Count (prompts, experts) mean scores; nothing of the size of all prompts is kept."""
        before, self._count = self._count, self._count + len(means)
        batch_mean = means.mean(dim=0)
        gap = batch_mean - self._mean
        # Squared deviations of the two parts from their own means, and what their means lie apart (Chan et al.).
        apart = gap.square() * before * len(means) / self._count
        self._squares = self._squares + (means - batch_mean).square().sum(dim=0) + apart
        self._mean = self._mean + gap * len(means) / self._count

    def moments(self, path: str, names: Sequence[str]) -> Tensor:
        """(experts, 2) means and deviations, for experts of these names at this path."""
        measured = self._scored.alive.cpu() & (self._count > 0)
        deviation = (self._squares / max(self._count - 1, 1)).sqrt()
        constant = measured & (deviation <= _ROUNDING * self._mean)
        if bool(constant.any()):
            raise TaskError(
                f"the experts' prompts must differ, for a deviation of the scores of expert "
                f"'{names[int(constant.nonzero()[0])]}' at {path}",
                found=f"{self._count} prompts on which it scores the same",
                remedy="raise --rows",
            )
        blank = torch.tensor([0.0, 1.0], dtype=torch.float64)
        return torch.where(measured[:, None], torch.stack([self._mean, deviation], dim=1), blank)
