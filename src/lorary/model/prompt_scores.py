"""How experts score prompts, layer by layer, while the bare base runs: what means and deviations are made of."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorary.errors import TaskError
from lorary.lora.gate import LayerInput
from lorary.lora.gated import GatedLora
from lorary.lora.seat import seated_instead
from lorary.model.features import decoder_of, prompt_batches
from lorary.model.gates import ScoreGate
from lorary.model.layers import SeatedLayer
from lorary.model.row_gates import rows_of
from lorary.ops.choose import Choice
from lorary.route.rule import Rule

# Path of the layer, which prompts, (prompts, experts of the layer) mean scores in float64 on the CPU.
Look = Callable[[str, Sequence[int], Tensor], None]
# Deviations below this part of the mean are the rounding of equal scores.
_ROUNDING = 1e-6
# The mean and the deviation that leave scores as they are, and that stand where nothing is measured.
_BLANK = torch.tensor([0.0, 1.0], dtype=torch.float64)


@torch.no_grad()
def watch_prompts(
    model: Any, rule: Rule, layers: Mapping[str, SeatedLayer], prompts: Sequence[Sequence[int]], look: Look
) -> None:
    """Show the mean score of each expert over the tokens of each prompt, in each layer that the decoder runs.

    The bare base runs. Experts that are seated in the model do not act, and its router plays no part.

    Args:
        model: the base model, with or without experts seated in it; as it was when this ends.
        rule: a rule whose scores are read against means and deviations; here they are not.
        layers: the experts to score.
        prompts: token ids, at least one in each.
        look: is shown the scores batch by batch; 0 for experts that do nothing in the layer.
    """
    watches = {path: _Watch(rule, path, layer, look) for path, layer in layers.items()}
    loras = {}
    for path, layer in layers.items():
        lora = layer.lora
        loras[path] = GatedLora(lora.down, lora.up, lora.expert_of_rank)  # the same tensors: gates in force stay
        loras[path].route_by(watches[path], "outputs")
    with seated_instead(model, loras):
        for bucket, ids, real in prompt_batches(model, prompts):
            for watch in watches.values():
                watch.bucket, watch.real = bucket, real
            # Not through the decoder's own hooks, which may decide for a request.
            decoder_of(model).forward(input_ids=ids, use_cache=False)


def checked_moments(
    mean: Tensor, deviation: Tensor, measured: Tensor, path: str, names: Sequence[str], remedy: str
) -> Tensor:
    """(experts, 2) means and deviations of scores in one layer; 0 and 1 for experts that were not measured there.

    Args:
        mean: (experts,) over prompts, float64.
        deviation: (experts,) likewise.
        measured: (experts,) bool.
        path: of the layer.
        names: of the experts.
        remedy: what to do where scores do not differ.

    Raises:
        TaskError: if an expert scores the same on all prompts, naming it and the layer.
    """
    same = measured & ~(deviation > _ROUNDING * mean)  # NaN, the deviation of one prompt, is none either
    if bool(same.any()):
        raise TaskError(
            f"prompts must differ, for a deviation of the scores of expert '{names[int(same.nonzero()[0])]}' at {path}",
            found="the same score on all of them",
            remedy=remedy,
        )
    return torch.where(measured[:, None], torch.stack([mean, deviation], dim=1), _BLANK)


class _Watch:
    """A gate that shows the mean score of each expert over each prompt, and leaves the layer as it is.

    Args:
        rule: that scores.
        path: of the layer.
        layer: that it is for.
        look: is shown the scores.
    """

    reads_prototypes, reads_z, most, quick, decided = False, True, 1, None, None

    def __init__(self, rule: Rule, path: str, layer: SeatedLayer, look: Look) -> None:
        everyone = torch.ones(len(layer.experts), dtype=torch.bool)
        plain = _BLANK.expand(len(layer.experts), 2)
        self._scored = ScoreGate(rule, layer, Choice(), everyone, input_norm=rule.input_norm, calibration=plain)
        self._path, self._look = path, look
        self.bucket: Sequence[int] = ()
        self.real = torch.empty(0)

    def __call__(self, inputs: LayerInput) -> None:
        batch, seq = rows_of(inputs)
        real = self.real.to(inputs.x.device)[..., None]
        scores = self._scored.scores(inputs).view(batch, seq, -1).double()
        sums = scores.masked_fill(~(real & self._scored.alive), 0.0).sum(dim=1)
        self._look(self._path, self.bucket, (sums / real.sum(dim=1)).cpu())
