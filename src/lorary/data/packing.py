"""Rows of many units as one sequence per micro-batch: no padding, and no token of a group of rows computed twice.

Rows of one task begin alike: with an instruction, a question form, a few solved examples. Sorted, each row shares with
its neighbour a beginning that is laid down once: the rows of a group form a tree. The trees of many units stand one
after another in a single sequence, which is all that a layer computing token by token needs to know. Attention alone
joins tokens: it is told where the tokens of each row lie (`lorary.data.places`). A model that cannot be told takes each
row as a sequence of its own, padded on the right.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from lorary.data.batching import Batch, input_length, length_buckets
from lorary.data.places import places_of
from lorary.data.template import Example, Ids, num_common

# Longest row in tokens that shares a sequence: models with a sliding window must hold a row in it, since attention to
# rows knows no windows.
PACKED_LENGTH = 512


@dataclass(frozen=True)
class Group:
    """Rows that may share tokens: of one trained unit and one task of it.

    Args:
        slot: position of the unit in the stack.
        task: number of the task within that unit, 0 where it has one task.
        rows: the rows.
        names: number of each row among the rows of that unit's step, for the keys of dropout.
    """

    slot: int
    task: int
    rows: Sequence[Example]
    names: Sequence[int]


class Piece(NamedTuple):
    """Where the tokens that a row shares with none before it lie: `start` to `stop` of a sequence."""

    sequence: int
    start: int
    stop: int
    slot: int
    name: int


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that go through the model together.

    Args:
        batch: tokens and targets; positions, and places of rows, where rows share a sequence.
        slots: unit of each span: a run of tokens of one unit and task, sequences being read one after another.
        tasks: task of each span within its unit.
        lengths: tokens of each span, padding counted.
        target_slots: unit of each target token.
        pieces: where each row's own tokens lie.
    """

    batch: Batch
    slots: Int[Tensor, " spans"]
    tasks: Int[Tensor, " spans"]
    lengths: tuple[int, ...]
    target_slots: Int[Tensor, " targets"]
    pieces: tuple[Piece, ...]

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch on a device."""
        slots, tasks, target_slots = (t.to(device) for t in (self.slots, self.tasks, self.target_slots))
        return MicroBatch(self.batch.to(device), slots, tasks, self.lengths, target_slots, self.pieces)


class _Tree(NamedTuple):
    """Some rows of a group in sorted order, with the tokens that each shares with the one before it."""

    group: Group
    rows: Sequence[int]
    shared: Sequence[int]

    @property
    def num_tokens(self) -> int:
        return sum(input_length(self.group.rows[row]) for row in self.rows) - sum(self.shared)


@dataclass
class _Sequence:
    """Tokens in the order in which rows bring them. `places[i]` says where each token of the i-th row lies."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    rows: list[tuple[Group, int]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    places: list[list[int]] = field(default_factory=list)

    def add(self, tree: _Tree) -> None:
        """Append the rows of a tree."""
        for row, num_shared in zip(tree.rows, tree.shared, strict=True):
            ids = _fed(tree.group.rows[row])
            start = len(self.ids)
            shared = self.places[-1][:num_shared] if num_shared else []
            self.rows.append((tree.group, row))
            self.starts.append(start)
            self.places.append([*shared, *range(start, start + len(ids) - num_shared)])
            self.ids += ids[num_shared:]
            self.positions += range(num_shared, len(ids))

    def pieces(self, number: int) -> list[Piece]:
        """Where each row's own tokens lie, this being the sequence of a number."""
        bounds = pairwise([*self.starts, len(self.ids)])
        return [
            Piece(number, start, stop, group.slot, group.names[row])
            for (group, row), (start, stop) in zip(self.rows, bounds, strict=True)
        ]

    def spans(self, length: int) -> list[tuple[int, int, int]]:
        """(slot, task, tokens) of each row's own tokens, the last row's with the padding up to a length."""
        bounds = pairwise([*self.starts, length])
        return [
            (group.slot, group.task, stop - start) for (group, _), (start, stop) in zip(self.rows, bounds, strict=True)
        ]


def micro_batches(
    groups: Sequence[Group], max_tokens: int, *, share_prefix: bool, longest: int = PACKED_LENGTH
) -> list[MicroBatch]:
    """Lay out the rows of many units and cut them into micro-batches.

    Which rows of a group share tokens depends on that group alone; its trees then share micro-batches with others,
    whichever unit they are of.

    Args:
        groups: the rows, each with at least one prompt and one target token.
        max_tokens: budget of one micro-batch, padding counted; a longer row gets one of its own.
        share_prefix: whether rows may share a sequence; False where the model or dropout forbids it.
        longest: tokens of the longest row that shares a sequence.

    Returns:
        Micro-batches that hold every target token once, on the CPU.
    """
    packed, alone = [], []
    for group in groups:
        fits = [share_prefix and input_length(row) <= longest for row in group.rows]
        alone += [_Tree(group, [row], [0]) for row, is_short in enumerate(fits) if not is_short]
        packed += _trees(group, [row for row, is_short in enumerate(fits) if is_short], max_tokens)
    micros = [_packed(trees) for trees in _first_fit(packed, max_tokens)]
    for bucket in length_buckets([tree.num_tokens for tree in alone], max_tokens):
        micros.append(_padded(sorted((alone[i] for i in sorted(bucket)), key=_owner)))
    return micros


def _trees(group: Group, rows: Sequence[int], max_tokens: int) -> list[_Tree]:
    """Rows in sorted order, cut where a tree would exceed the budget."""
    fed = {row: _fed(group.rows[row]) for row in rows}
    trees: list[_Tree] = []
    tokens = 0
    for row in sorted(rows, key=lambda row: fed[row]):
        shared = num_common(fed[trees[-1].rows[-1]], fed[row]) if trees else 0
        if trees and tokens + len(fed[row]) - shared <= max_tokens:
            last = trees[-1]
            trees[-1] = _Tree(group, [*last.rows, row], [*last.shared, shared])
            tokens += len(fed[row]) - shared
        else:
            trees.append(_Tree(group, [row], [0]))
            tokens = len(fed[row])
    return trees


def _first_fit(trees: Sequence[_Tree], max_tokens: int) -> list[list[_Tree]]:
    """The largest trees first, each into the first micro-batch that has room for it."""
    bins: list[list[_Tree]] = []
    room: list[int] = []
    for tree in sorted(trees, key=lambda tree: -tree.num_tokens):
        place = next((i for i, free in enumerate(room) if tree.num_tokens <= free), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(max_tokens)
        bins[place].append(tree)
        room[place] -= tree.num_tokens
    return [sorted(members, key=_owner) for members in bins]


def _owner(tree: _Tree) -> tuple[int, int]:
    return tree.group.slot, tree.group.task


def _packed(trees: Sequence[_Tree]) -> MicroBatch:
    """Trees one after another in one sequence."""
    sequence = _Sequence()
    for tree in trees:
        sequence.add(tree)
    batch = _targets([sequence])._replace(
        input_ids=torch.tensor([sequence.ids]),
        position_ids=torch.tensor([sequence.positions]),
        places=places_of(sequence.places),
    )
    return _micro_batch([sequence], batch, len(sequence.ids))


def _padded(rows: Sequence[_Tree]) -> MicroBatch:
    """Each row a sequence, padded on the right."""
    sequences = [_Sequence() for _ in rows]
    for sequence, row in zip(sequences, rows, strict=True):
        sequence.add(row)
    length = max(len(sequence.ids) for sequence in sequences)
    ids = torch.tensor([[*sequence.ids, *([0] * (length - len(sequence.ids)))] for sequence in sequences])
    return _micro_batch(sequences, _targets(sequences)._replace(input_ids=ids), length)


def _micro_batch(sequences: Sequence[_Sequence], batch: Batch, length: int) -> MicroBatch:
    pieces = [piece for number, sequence in enumerate(sequences) for piece in sequence.pieces(number)]
    spans = [span for sequence in sequences for span in sequence.spans(length)]
    runs = [(*owner, sum(span[2] for span in run)) for owner, run in groupby(spans, key=lambda span: span[:2])]
    slots, tasks, lengths = zip(*runs, strict=True)
    slot_of_row = [group.slot for sequence in sequences for group, _ in sequence.rows]
    targets_of_row = [len(group.rows[row].target_ids) for sequence in sequences for group, row in sequence.rows]
    target_slots = torch.tensor(slot_of_row).repeat_interleave(torch.tensor(targets_of_row))
    return MicroBatch(batch, torch.tensor(slots), torch.tensor(tasks), lengths, target_slots, tuple(pieces))


def _targets(sequences: Sequence[_Sequence]) -> Batch:
    """A batch that only says where which target token is predicted."""
    rows: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    for number, sequence in enumerate(sequences):
        for (group, row), places in zip(sequence.rows, sequence.places, strict=True):
            example = group.rows[row]
            rows += [number] * len(example.target_ids)
            positions += places[len(example.prompt_ids) - 1 :]
            labels += example.target_ids
    return Batch(torch.empty(0), torch.tensor(rows), torch.tensor(positions), torch.tensor(labels))


def _fed(example: Example) -> Ids:
    """The ids fed for a row: all but its last target token, which nothing follows."""
    return (*example.prompt_ids, *example.target_ids)[: input_length(example)]
