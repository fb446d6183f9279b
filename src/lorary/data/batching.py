"""Batches: which rows meet at which step, and how they are padded."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorary.data.places import Places
from lorary.data.template import Example
from lorary.errors import TaskError
from lorary.keys import keyed_generator

# Rows are sorted by length inside blocks of this many batches: enough to pad little, short enough to stay random.
BLOCK = 8


class Batch(NamedTuple):
    """Sequences padded on the right, and the places where a target token is predicted.

    `input_ids` is (batch, seq); `rows`, `positions` and `labels` are (targets,): `labels[i]` is what position
    `positions[i]` of sequence `rows[i]` must predict. Where a sequence is one row, attention is causal, so that padding
    on the right is never seen and needs no mask; it is recognised by position, never by token id. Where a sequence
    holds several rows (`lorary.data.packing`), `position_ids` (batch, seq) says how far each token is into its row, and
    `places` where the tokens of each row lie.
    """

    input_ids: Tensor
    rows: Tensor
    positions: Tensor
    labels: Tensor
    position_ids: Tensor | None = None
    places: Places | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return Batch._make(part if part is None else part.to(device) for part in self)


def input_length(example: Example) -> int:
    """Tokens fed for a row: all but the last target token, which nothing follows."""
    return len(example.prompt_ids) + len(example.target_ids) - 1


def collate(examples: Sequence[Example], pad_id: int = 0) -> Batch:
    """Pad rows into a batch.

    Args:
        examples: at least one row, each with at least one prompt and one target token.
        pad_id: what to pad with; its value has no effect.

    Returns:
        The batch, on the CPU.
    """
    seq = max(input_length(example) for example in examples)
    input_ids = torch.full((len(examples), seq), pad_id)
    rows: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    for row, example in enumerate(examples):
        ids = (*example.prompt_ids, *example.target_ids)[:-1]
        input_ids[row, : len(ids)] = torch.tensor(ids)
        first = len(example.prompt_ids) - 1
        rows += [row] * len(example.target_ids)
        positions += range(first, first + len(example.target_ids))
        labels += example.target_ids
    return Batch(input_ids, torch.tensor(rows), torch.tensor(positions), torch.tensor(labels))


def plan_batches(lengths: Sequence[int], batch_size: int, num_steps: int, *key: object) -> list[list[int]]:
    """Row numbers of every training batch of one expert.

    Epochs of permuted rows follow one another without a gap; blocks of `BLOCK` batches are sorted by length, cut into
    batches and put in random order. All of it depends on the key (seed, expert name) alone.

    Args:
        lengths: tokens of each row.
        batch_size: rows per batch; rows repeat where there are fewer.
        num_steps: number of batches.
        key: what the order depends on.

    Returns:
        `num_steps` lists of `batch_size` row numbers.

    Raises:
        TaskError: if there is no row.
    """
    if not lengths:
        raise TaskError("a task needs at least one row to train on", found=0, remedy="give it rows of the split train")
    generator = keyed_generator("order", *key)
    needed = batch_size * num_steps
    stream: list[int] = []
    while len(stream) < needed:
        stream += torch.randperm(len(lengths), generator=generator).tolist()
    return _cut_by_length(stream[:needed], lengths, batch_size, generator)


def plan_weighted_batches(
    lengths: Sequence[int],
    tasks: Sequence[int],
    weights: Sequence[float],
    batch_size: int,
    num_steps: int,
    *key: object,
) -> list[list[int]]:
    """Row numbers of every training batch of a unit whose tasks are drawn by weight.

    The task of each row is drawn in proportion to the weights; the rows of a task come in permuted epochs. Batches are
    then made by length as `plan_batches` makes them.

    Args:
        lengths: tokens of each row.
        tasks: task of each row.
        weights: of tasks 0, 1, ..., each above 0, in any unit; every task has rows.
        batch_size: rows per batch; rows repeat where there are fewer.
        num_steps: number of batches.
        key: what the order depends on.

    Returns:
        `num_steps` lists of `batch_size` row numbers.
    """
    generator = keyed_generator("order", *key)
    rows_of: list[list[int]] = [[] for _ in weights]
    for row, task in enumerate(tasks):
        rows_of[task].append(row)
    waiting: list[list[int]] = [[] for _ in weights]
    shares = torch.tensor(weights, dtype=torch.float64)
    stream = []
    for task in torch.multinomial(shares, batch_size * num_steps, replacement=True, generator=generator).tolist():
        if not waiting[task]:
            waiting[task] = [rows_of[task][i] for i in torch.randperm(len(rows_of[task]), generator=generator).tolist()]
        stream.append(waiting[task].pop())
    return _cut_by_length(stream, lengths, batch_size, generator)


def _cut_by_length(
    stream: Sequence[int], lengths: Sequence[int], batch_size: int, generator: torch.Generator
) -> list[list[int]]:
    """Batches out of a stream of rows: blocks sorted by length, cut, and put in random order."""
    batches: list[list[int]] = []
    for start in range(0, len(stream), batch_size * BLOCK):
        block = sorted(stream[start : start + batch_size * BLOCK], key=lambda row: (lengths[row], row))
        cut = [block[i : i + batch_size] for i in range(0, len(block), batch_size)]
        batches += [cut[i] for i in torch.randperm(len(cut), generator=generator).tolist()]
    return batches


def length_buckets(lengths: Sequence[int], max_tokens: int, max_rows: int | None = None) -> list[list[int]]:
    """Cut rows into batches of similar length under a budget of padded tokens.

    Args:
        lengths: tokens of each row.
        max_tokens: budget of one batch, padding counted; a longer row gets a batch of its own.
        max_rows: most rows of one batch.

    Returns:
        Lists of row numbers that hold every row once, longest rows first.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    buckets: list[list[int]] = []
    for row in order:
        longest = lengths[buckets[-1][0]] if buckets else 0
        if buckets and longest * (len(buckets[-1]) + 1) <= max_tokens and len(buckets[-1]) != max_rows:
            buckets[-1].append(row)
        else:
            buckets.append([row])
    return buckets
