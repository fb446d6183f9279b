"""Sampled tokens that depend on a row's own seed, never on the batch it stands in."""

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor


class Sampler(LogitsProcessor):
    """Leaves each row the one token that its own generator draws; the greedy choice then takes it.

    transformers samples all rows of a batch from one stream, so that an answer changes with the company of its row.

    Args:
        temperature: above 0.
        top_p: in 0..1; tokens beyond the likeliest ones that hold so much probability are left out.
        seeds: one per row of the batch.
    """

    def __init__(self, temperature: float, top_p: float, seeds: Sequence[int]) -> None:
        self._temperature = temperature
        self._top_p = top_p
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(batch, vocabulary) logits with all but the token drawn at minus infinity."""
        probabilities = (scores.double() / self._temperature).softmax(-1)
        ordered, ids = probabilities.sort(dim=-1, descending=True)
        cumulative = ordered.cumsum(-1)
        ordered = ordered.masked_fill(cumulative - ordered >= self._top_p, 0.0)  # the likeliest token always stays
        cumulative = ordered.cumsum(-1)
        draws = torch.cat([torch.rand(1, generator=own, dtype=torch.float64) for own in self._generators])
        target = draws.to(scores.device)[:, None] * cumulative[:, -1:]
        place = torch.searchsorted(cumulative, target, right=True)
        last = (ordered > 0).sum(-1, keepdim=True) - 1
        drawn = ids.gather(-1, torch.minimum(place, last))
        return torch.full_like(scores, float("-inf")).scatter(-1, drawn, 0.0)
