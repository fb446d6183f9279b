"""Log-likelihoods of given answers, batched by length."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lorary.data.batching import Batch, collate, input_length, length_buckets
from lorary.data.template import Example
from lorary.model.logits import target_losses
from lorary.model.probe import deciding_by
from lorary.model.seating import prober_of


class AnswerLoss(NamedTuple):
    """Loss of one answer: nats summed over its tokens (EOS included), how many those are, and the nats of EOS alone."""

    total: float
    num_tokens: int
    eos: float = 0.0

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

    Args:
        model: a transformers model for causal language modelling, routed or not.
        examples: encoded rows.
        max_tokens: padded tokens of one batch.

    Returns:
        One loss per row, in the order given.
    """
    device = next(model.parameters()).device
    results: list[AnswerLoss | None] = [None] * len(examples)
    for bucket in length_buckets([input_length(x) for x in examples], max_tokens):
        batch = collate([examples[i] for i in bucket]).to(device)
        with deciding_by(prober_of(model), _prompts(batch)):  # a decision for a request must not read its answer
            losses = target_losses(model, batch).double()
        totals = torch.zeros(len(bucket), dtype=torch.float64, device=device).index_add_(0, batch.rows, losses)
        last = torch.bincount(batch.rows).cumsum(0) - 1  # the targets of a row stand together, EOS at their end
        for i, total, eos in zip(bucket, totals.tolist(), losses[last].tolist(), strict=True):
            results[i] = AnswerLoss(total, len(examples[i].target_ids), eos)
    return [result for result in results if result is not None]


def _prompts(batch: Batch) -> torch.Tensor:
    """(batch, seq) bool: the tokens up to the one that predicts the first target token."""
    num_rows, seq = batch.input_ids.shape
    last = torch.full((num_rows,), seq, device=batch.rows.device)
    last = last.scatter_reduce(0, batch.rows, batch.positions, "amin")
    return torch.arange(seq, device=last.device) <= last[:, None]


def choose_options(losses: Sequence[Sequence[AnswerLoss]], *, normalise: bool, count_eos: bool = True) -> list[int]:
    """The most likely option of each row.

    Args:
        losses: for each row, the losses of its options.
        normalise: divide by the number of tokens, as the paper does; otherwise the raw sum decides.
        count_eos: count EOS among the tokens, as the paper does; the raw sum has it always.

    Returns:
        Position of the chosen option of each row; the first of equal ones.
    """

    def cost(loss: AnswerLoss) -> float:
        if not normalise:
            return loss.total
        return loss.mean if count_eos else loss.mean_no_eos

    return [min(range(len(row)), key=lambda option: cost(row[option])) for row in losses]
