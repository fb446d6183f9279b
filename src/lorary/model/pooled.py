"""What each expert scores on the prompts of all experts: the yardstick of `lorary.route.contrast`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorary.errors import TaskError
from lorary.library.store import Library
from lorary.lora.gate import Seen
from lorary.model.attach import attach, detach
from lorary.model.features import decoder_of, prompt_batches
from lorary.model.gates import ScoreGate
from lorary.model.row_gates import rows_of
from lorary.model.seating import seating


@torch.no_grad()
def pooled_moments(
    model: Any, library: Library, prompts: Sequence[Sequence[int]], *, force_base: bool = False
) -> dict[str, dict[str, Tensor]]:
    """Mean and deviation of each expert's mean projection score over a prompt, over prompts of all experts.

    The bare base runs; all experts are seated and none acts.

    Args:
        model: the bare base model.
        library: the experts.
        prompts: token ids, those of all experts together.
        force_base: accept unrelated weights of the same shapes.

    Returns:
        By expert and path of the layer (2,), in the dtype of the experts; mean 0 and deviation 1 for one that does
        nothing there.

    Raises:
        TaskError: if an expert scores the same on all prompts.
    """
    attach(model, library, router="projection", input_norm="unit", force_base=force_base)
    try:
        state = seating(model)
        watches = {path: _Watch(layer.lora.gate) for path, layer in state.layers.items()}
        for path, layer in state.layers.items():
            layer.lora.route_by(watches[path], "outputs")
        for _, ids, real in prompt_batches(model, prompts):
            for watch in watches.values():
                watch.real = real
            decoder_of(model)(input_ids=ids, use_cache=False)
        found: dict[str, dict[str, Tensor]] = {name: {} for name in state.experts}
        for path, layer in state.layers.items():
            moments = _moments(torch.cat(watches[path].means), layer.alive, path).to(layer.lora.up.dtype)
            for position, own in zip(layer.experts, moments, strict=True):
                found[state.experts[position]][path] = own
    finally:
        detach(model)
    return found


def _moments(means: Tensor, alive: Tensor, path: str) -> Tensor:
    """(experts, 2) from the (prompts, experts) mean scores of one layer."""
    deviation, mean = torch.std_mean(means, dim=0) if len(means) > 1 else means.new_zeros(2, means.shape[1])
    if not bool((deviation > 0)[alive].all()):
        raise TaskError(
            f"the experts' prompts must differ, for deviations of their scores at {path}",
            found=f"{len(means)} prompts on which an expert scores the same",
            remedy="raise --rows",
        )
    blank = torch.tensor([0.0, 1.0], dtype=means.dtype)
    return torch.where(alive[:, None], torch.stack([mean, deviation], dim=1), blank)


class _Watch(nn.Module):
    """A gate that keeps the mean score of each expert over each prompt, and leaves the layer as it is.

    Args:
        scored: the gate that scores.
    """

    reads_prototypes, reads_z, most, quick = False, True, 1, None

    def __init__(self, scored: Any) -> None:
        super().__init__()
        assert isinstance(scored, ScoreGate)
        self._scored = scored
        self.real = torch.empty(0)
        self.means: list[Tensor] = []

    def forward(self, seen: Seen) -> None:
        batch, seq = rows_of(seen)
        real = self.real.to(seen.x.device)[..., None]
        scores = self._scored.scores(seen).view(batch, seq, -1).double()
        sums = scores.masked_fill(~real, 0.0).sum(dim=1)
        self.means.append((sums / real.sum(dim=1)).cpu())
