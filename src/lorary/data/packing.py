"""Packing: rows that begin alike share the tokens they begin with, so that no token is computed twice.

    rows      the sky is blue    the sky is dark    the sea
    sequence  the sky is blue dark sea        positions 0 1 2 3 3 1

A token of a causal model depends on the tokens before it in its row and on nothing else. Laid out as a tree, each
token with its depth as position and a mask that lets it see its ancestors only, the rows of a sequence get the very
hidden states they get alone. Longer sequences cost attention, which is quadratic, and a mask; where the tokens saved
are worth less than that, rows stay sequences of their own, padded on the right.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from lorary.data.batching import Batch, input_length, length_buckets
from lorary.data.sharing import PACKED_LENGTH, best_cuts
from lorary.data.template import Example, Ids, num_common


@dataclass(frozen=True)
class Group:
    """Rows that may share a sequence: of one trained unit and one task of it.

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
        batch: tokens, targets, and mask and positions where sequences are packed.
        slots: unit of each sequence, ascending.
        tasks: task of each sequence within its unit.
        target_slots: unit of each target token.
        pieces: where each row's own tokens lie.
    """

    batch: Batch
    slots: Int[Tensor, " sequences"]
    tasks: Int[Tensor, " sequences"]
    target_slots: Int[Tensor, " targets"]
    pieces: tuple[Piece, ...]

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch on a device."""
        slots, tasks, target_slots = (t.to(device) for t in (self.slots, self.tasks, self.target_slots))
        return MicroBatch(self.batch.to(device), slots, tasks, target_slots, self.pieces)


@dataclass
class _Sequence:
    """Rows of one group in one sequence: the tree's tokens in the order its rows bring them.

    `places[i]` says where each token of row i lies; tokens from `starts[i]` on are its own.
    """

    group: Group
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    places: list[list[int]] = field(default_factory=list)

    @property
    def is_packed(self) -> bool:
        """Whether several rows share this sequence."""
        return len(self.rows) > 1

    def add(self, row: int, num_shared: int) -> None:
        """Append a row whose first `num_shared` tokens are those of the row before it."""
        ids = _fed(self.group.rows[row])
        start = len(self.ids)
        shared = self.places[-1][:num_shared] if num_shared else []
        self.rows.append(row)
        self.starts.append(start)
        self.places.append([*shared, *range(start, start + len(ids) - num_shared)])
        self.ids += ids[num_shared:]
        self.positions += range(num_shared, len(ids))


def micro_batches(
    groups: Sequence[Group], max_tokens: int, *, share_prefix: bool, longest: int = PACKED_LENGTH
) -> list[MicroBatch]:
    """Lay out the rows of many units and cut them into micro-batches.

    How the rows of a group are laid out depends on that group alone; sequences of similar length then share a
    micro-batch, whichever unit they are of.

    Args:
        groups: the rows, each with at least one prompt and one target token.
        max_tokens: budget of one micro-batch, padding counted; a longer sequence gets one of its own.
        share_prefix: whether rows may share a sequence; False where the model or dropout forbids it.
        longest: most tokens of a sequence that rows share.

    Returns:
        Micro-batches that hold every target token once, on the CPU, the longest sequences first.
    """
    sequences = [sequence for group in groups for sequence in _lay_out(group, share_prefix, longest)]
    micros = []
    for packed in (True, False):
        alike = [sequence for sequence in sequences if sequence.is_packed is packed]
        for bucket in length_buckets([len(sequence.ids) for sequence in alike], max_tokens):
            members = [alike[i] for i in sorted(bucket)]
            micros.append(_collate(sorted(members, key=lambda s: s.group.slot)))
    return micros


def _lay_out(group: Group, share_prefix: bool, longest: int) -> list[_Sequence]:
    """The sequences of a group: each row alone, or neighbours in sorted order together."""
    order = list(range(len(group.rows)))
    if not share_prefix:
        return [_sequence(group, [row], [0]) for row in order]
    fed = [_fed(example) for example in group.rows]
    order.sort(key=lambda row: fed[row])
    shared = [0, *(num_common(fed[a], fed[b]) for a, b in pairwise(order))]
    cuts = best_cuts([len(fed[row]) for row in order], shared, longest)
    return [_sequence(group, order[a:b], [0, *shared[a + 1 : b]]) for a, b in pairwise(cuts)]


def _sequence(group: Group, rows: Sequence[int], shared: Sequence[int]) -> _Sequence:
    sequence = _Sequence(group)
    for row, num_shared in zip(rows, shared, strict=True):
        sequence.add(row, num_shared)
    return sequence


def _collate(sequences: Sequence[_Sequence]) -> MicroBatch:
    length = max(len(sequence.ids) for sequence in sequences)
    batch = _targets(sequences)._replace(input_ids=_padded([s.ids for s in sequences], length))
    if sequences[0].is_packed:
        position_ids = _padded([s.positions for s in sequences], length)
        batch = batch._replace(position_ids=position_ids, mask=_mask(sequences, length))
    slots = torch.tensor([s.group.slot for s in sequences])
    tasks = torch.tensor([s.group.task for s in sequences])
    pieces = tuple(piece for number, s in enumerate(sequences) for piece in _pieces(number, s))
    return MicroBatch(batch, slots, tasks, slots[batch.rows], pieces)


def _targets(sequences: Sequence[_Sequence]) -> Batch:
    """A batch that only says where which target token is predicted."""
    rows: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    for number, sequence in enumerate(sequences):
        for row, places in zip(sequence.rows, sequence.places, strict=True):
            example = sequence.group.rows[row]
            rows += [number] * len(example.target_ids)
            positions += places[len(example.prompt_ids) - 1 :]
            labels += example.target_ids
    return Batch(torch.empty(0), torch.tensor(rows), torch.tensor(positions), torch.tensor(labels))


def _mask(sequences: Sequence[_Sequence], length: int) -> Tensor:
    """(sequences, 1, seq, seq): True where a token sees another, which is among its ancestors or itself."""
    mask = torch.eye(length, dtype=torch.bool).repeat(len(sequences), 1, 1)  # padding sees itself: no empty softmax
    for sequence, sees in zip(sequences, mask, strict=True):
        for start, places in zip(sequence.starts, sequence.places, strict=True):
            num_own = sum(place >= start for place in places)
            stop = start + num_own
            sees[start:stop, places[: len(places) - num_own]] = True
            sees[start:stop, start:stop] = torch.ones(num_own, num_own, dtype=torch.bool).tril_()
    return mask[:, None]


def _pieces(number: int, sequence: _Sequence) -> list[Piece]:
    stops = [*sequence.starts[1:], len(sequence.ids)]
    return [
        Piece(number, start, stop, sequence.group.slot, sequence.group.names[row])
        for row, start, stop in zip(sequence.rows, sequence.starts, stops, strict=True)
    ]


def _padded(rows: Sequence[Sequence[int]], length: int) -> Tensor:
    return torch.tensor([[*row, *([0] * (length - len(row)))] for row in rows])


def _fed(example: Example) -> Ids:
    """The ids fed for a row: all but its last target token, which nothing follows."""
    return (*example.prompt_ids, *example.target_ids)[: input_length(example)]
