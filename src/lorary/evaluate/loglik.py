"""Log-likelihoods of given answers: rows that begin alike, as the options of one question do, share what they share."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lorary.data.batching import Batch
from lorary.data.packing import Group, MicroBatch, micro_batches
from lorary.data.template import Example
from lorary.model.logits import label_losses, packed_length, target_logits
from lorary.model.probe import deciding_by
from lorary.model.seating import has_row_settings, prober_of

# What each model was found to allow, since finding out takes three short passes: up to how many tokens, by what its
# answer depends on.
_PACKED_LENGTHS: "WeakKeyDictionary[Any, dict[tuple[Any, ...], int]]" = WeakKeyDictionary()


class AnswerLoss(NamedTuple):
    """Loss of one answer.

    Args:
        total: nats summed over its tokens, EOS included.
        num_tokens: how many those are.
        eos: nats of the last of them, which is EOS in every template.
        is_greedy: whether each of them is the likeliest one where it stands.
    """

    total: float
    num_tokens: int
    eos: float = 0.0
    is_greedy: bool = False

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.total / self.num_tokens

    @property
    def mean_no_eos(self) -> float:
        """Nats per token, EOS left out of both."""
        return (self.total - self.eos) / max(self.num_tokens - 1, 1)


@torch.no_grad()
def answer_losses(model: Any, examples: Sequence[Example], max_tokens: int = 2048) -> list[AnswerLoss]:
    """Negative log-likelihood of each row's target after its prompt.

    Tokens that rows have in common from the left on are computed once, where that is exact for the model and pays
    (`lorary.data.packing`). It stays exact under routers that decide token by token, which give the tokens of a prompt
    the same experts whatever follows. A router that decides for a whole request, or settings that differ from row to
    row, keep rows apart.

    Args:
        model: a transformers model for causal language modelling, routed or not.
        examples: encoded rows; where each row has a setting of its own (`lorary.routing` with a list), in that order.
        max_tokens: tokens of one batch, padding counted.

    Returns:
        One loss per row, in the order given.
    """
    results: dict[int, AnswerLoss] = {}
    for micro in _layouts(model, examples, max_tokens):
        batch = micro.batch.to(model.device)
        with deciding_by(prober_of(model), _prompts(batch)):  # a decision for a request must not read its answer
            logits = target_logits(model, batch)
        losses = label_losses(logits, batch.labels).cpu().double()
        is_greedy = logits.argmax(dim=1) == batch.labels
        rows = [piece.name for piece in micro.pieces]  # targets lie in the order of the rows' pieces
        counts = [len(examples[row].target_ids) for row in rows]
        for row, row_losses, greedy in zip(rows, losses.split(counts), is_greedy.cpu().split(counts), strict=True):
            results[row] = AnswerLoss(
                float(row_losses.sum()), len(row_losses), float(row_losses[-1]), bool(greedy.all())
            )
    return [results[row] for row in range(len(examples))]


def _layouts(model: Any, examples: Sequence[Example], max_tokens: int) -> Iterator[MicroBatch]:
    """The rows in batches; `names` of their pieces are row numbers."""
    rows = [Group(0, 0, examples, range(len(examples)))]
    if has_row_settings(model):  # all in one batch, in order: the settings count its rows
        return iter(micro_batches(rows, sys.maxsize, share_prefix=False))
    longest = 0 if prober_of(model) is not None else _packed_length(model, max_tokens)
    return iter(micro_batches(rows, max_tokens, share_prefix=longest > 0, longest=longest))


def _packed_length(model: Any, longest: int) -> int:
    lengths = _PACKED_LENGTHS.setdefault(model, {})
    key = (longest, model.config.get_text_config(decoder=True)._attn_implementation, model.dtype, model.device)
    if key not in lengths:
        lengths[key] = packed_length(model, longest)
    return lengths[key]


def _prompts(batch: Batch) -> Tensor:
    """(batch, seq) bool: the tokens up to the one that predicts the first target token."""
    num_rows, seq = batch.input_ids.shape
    last = torch.full((num_rows,), seq, device=batch.rows.device)
    last = last.scatter_reduce(0, batch.rows, batch.positions, "amin")
    return torch.arange(seq, device=last.device) <= last[:, None]
