"""What routers are held against beside the base: which expert each uses on a task, or that it uses the base."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any, NamedTuple

import torch

from lorary.data.schema import Row, Task
from lorary.model.seating import seating

# Of the draws of `drawn_anew`.
SEED = 0


class Look(NamedTuple):
    """Means over some rows of a task.

    Args:
        score: of the task's metric.
        loss: in nats per target token.
    """

    score: float
    loss: float


def reference_rows(task: Task, number: int) -> tuple[str, Sequence[Row]]:
    """The rows by which a reference is chosen: validation rows, else training rows, else test rows.

    Args:
        task: the task.
        number: how many, at most.

    Returns:
        Their split and the rows.
    """
    splits = ((split, task.split(split)[:number]) for split in ("val", "train", "test"))
    return next(((split, rows) for split, rows in splits if rows), ("test", ()))


def best_single(losses: Sequence[Mapping[str, float]]) -> str:
    """The one expert of the lowest mean loss over tasks.

    Args:
        losses: for each task the loss of each expert.
    """
    means = {name: fmean(by_expert[name] for by_expert in losses) for name in losses[0]}
    return min(means, key=lambda name: (means[name], name))


@contextmanager
def drawn_anew(model: Any, expert: str) -> Iterator[None]:
    """Give an expert factors of normal numbers while the context lasts, each with the norm of the one it replaces.

    Args:
        model: with the expert seated; no setting may be made ready before and used inside.
        expert: its name, which the draws follow from.
    """
    state, kept = seating(model), list[tuple[torch.Tensor, slice, torch.Tensor]]()
    generator = torch.Generator().manual_seed(zlib.crc32(expert.encode()) + SEED)
    position = state.experts.index(expert)
    for layer in state.layers.values():
        if position not in layer.experts:
            continue
        seat = layer.experts.index(position)
        ranks = layer.rank_index(seat)
        beside = [(rows, slice(seat, seat + 1)) for rows in (layer.lora.offset, layer.lora.gain) if rows is not None]
        for factors, index in ((layer.lora.down, ranks), (layer.lora.up, ranks), *beside):
            before = factors[index].clone()
            drawn = torch.randn(before.shape, generator=generator, dtype=torch.float64).to(before)
            kept.append((factors, index, before))
            factors[index] = drawn * (before.norm() / drawn.norm())
    try:
        yield
    finally:
        for factors, ranks, before in kept:
            factors[ranks] = before
