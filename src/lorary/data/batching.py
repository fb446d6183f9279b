"""Batches: which rows meet at which step, and how they are padded."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorary.data.template import Example
from lorary.errors import TaskError
from lorary.keys import keyed_generator

# Rows are sorted by length inside blocks of this many batches: enough to pad little, short enough to stay random.
BLOCK = 8


class Batch(NamedTuple):
    """Rows padded on the right, and the places where a target token is predicted.

    `input_ids` is (batch, seq); `rows`, `positions` and `labels` are (targets,): `labels[i]` is what position
    `positions[i]` of row `rows[i]` must predict. Attention is causal, so that padding on the right is never seen and
    needs no mask; it is recognised by position, never by token id.
    """

    input_ids: Tensor
    rows: Tensor
    positions: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return Batch(*(tensor.to(device) for tensor in self))


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
    batches: list[list[int]] = []
    for start in range(0, needed, batch_size * BLOCK):
        block = sorted(stream[start : min(start + batch_size * BLOCK, needed)], key=lambda row: (lengths[row], row))
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
