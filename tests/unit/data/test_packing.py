"""Packed rows: every row finds its own tokens, at its own positions, and sees nothing else; no token comes twice."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorary.data.batching import input_length
from lorary.data.packing import PACKED_LENGTH, Group, MicroBatch, micro_batches
from lorary.data.places import LEAST_FILL, Places
from lorary.data.template import Example

fixed = settings(max_examples=60)
# Few different ids, so that rows begin alike, repeat, and are beginnings of one another.
IDS = st.lists(st.integers(1, 2), min_size=1, max_size=9).map(tuple)
# Ids alone: the shape checker draws random numbers when it checks an Example, which a strategy must not.
Pairs = list[tuple[tuple[int, ...], tuple[int, ...]]]
ROWS = st.lists(st.tuples(IDS, IDS), min_size=1, max_size=8)


def examples(pairs: Pairs) -> list[Example]:
    return [Example(prompt, target, 0) for prompt, target in pairs]


def group(rows: Sequence[Example], slot: int = 0, task: int = 0) -> Group:
    return Group(slot, task, rows, range(len(rows)))


def laid_out_rows(places: Places) -> list[list[list[int]]]:
    """The tokens of each row of each block, padding and all."""
    blocks = places.tokens.split([rows * longest for rows, longest in places.shapes])
    return [block.view(shape).tolist() for block, shape in zip(blocks, places.shapes, strict=True)]


def seen_rows(micro: MicroBatch) -> list[tuple[int, int, tuple[int, ...], int]]:
    """What each target is predicted from: (slot, task, the tokens it sees in the order of their positions, label)."""
    batch = micro.batch
    owners = [
        owner
        for *owner, length in zip(micro.slots.tolist(), micro.tasks.tolist(), micro.lengths, strict=True)
        for _ in range(length)
    ]
    found = []
    for row, position, label in zip(*(t.tolist() for t in (batch.rows, batch.positions, batch.labels)), strict=True):
        if batch.places is None or batch.position_ids is None:
            ids = batch.input_ids[row, : position + 1].tolist()
        else:
            owner = int(batch.places.owners[position])
            assert batch.places.tokens[owner] == position
            own = next(line for line in lines_of(batch.places) if line.start <= owner < line.stop)
            seen = batch.places.tokens[own.start : owner + 1]
            assert batch.position_ids[0, seen].tolist() == list(range(len(seen)))
            ids = batch.input_ids[0, seen].tolist()
        slot, task = owners[row * batch.input_ids.shape[1] + position]
        found.append((slot, task, tuple(ids), label))
    return found


def lines_of(places: Places) -> list[range]:
    """The places of each row, padding counted."""
    starts = [0]
    for rows, longest in places.shapes:
        starts += [starts[-1] + longest * (i + 1) for i in range(rows)]
    return [range(start, stop) for start, stop in pairwise(starts)]


def wanted_rows(groups: Sequence[Group]) -> list[tuple[int, int, tuple[int, ...], int]]:
    wanted = []
    for own in groups:
        for row in own.rows:
            for i, label in enumerate(row.target_ids):
                wanted.append((own.slot, own.task, (*row.prompt_ids, *row.target_ids[:i]), label))
    return wanted


@fixed
@given(st.lists(ROWS, min_size=1, max_size=4), st.integers(1, 60), st.booleans())
def test_every_target_is_predicted_from_its_own_row_and_nothing_else(
    tasks: list[Pairs], max_tokens: int, share_prefix: bool
) -> None:
    groups = [group(examples(pairs), slot=i // 2, task=i % 2) for i, pairs in enumerate(tasks)]
    micros = micro_batches(groups, max_tokens, share_prefix=share_prefix)
    assert sorted(row for micro in micros for row in seen_rows(micro)) == sorted(wanted_rows(groups))
    for micro in micros:
        assert micro.target_slots.tolist() == [slot for slot, *_ in seen_rows(micro)]
        assert micro.slots.tolist() == sorted(micro.slots.tolist())
        assert sum(micro.lengths) == micro.batch.input_ids.numel()
        assert len(micro.pieces) == 1 or micro.batch.input_ids.numel() <= max_tokens


@fixed
@given(ROWS)
def test_a_packed_sequence_holds_no_token_of_a_group_twice(pairs: Pairs) -> None:
    rows = examples(pairs)
    (micro,) = micro_batches([group(rows)], 10_000, share_prefix=True)
    fed = [(*row.prompt_ids, *row.target_ids)[: input_length(row)] for row in rows]
    assert micro.batch.input_ids.numel() == len({ids[: i + 1] for ids in fed for i in range(len(ids))})


@fixed
@given(ROWS)
def test_every_token_has_one_owner_and_all_its_other_places_are_repeats(pairs: Pairs) -> None:
    rows = examples(pairs)
    (micro,) = micro_batches([group(rows)], 10_000, share_prefix=True)
    places = micro.batch.places
    assert places is not None
    assert places.tokens[places.owners].tolist() == list(range(micro.batch.input_ids.numel()))
    assert len(places.owners) + len(places.repeats) == sum(map(input_length, rows))
    assert not set(places.owners.tolist()) & set(places.repeats.tolist())
    for rows_of_block, longest in places.shapes:
        assert rows_of_block >= 1
        assert longest >= 1
    lengths = sorted(map(input_length, rows), reverse=True)
    for block, (_, longest) in zip(laid_out_rows(places), places.shapes, strict=True):
        own, lengths = lengths[: len(block)], lengths[len(block) :]
        assert own[0] == longest
        assert own[-1] >= LEAST_FILL * longest


@fixed
@given(ROWS, st.booleans())
def test_pieces_cover_the_tokens_of_every_row(pairs: Pairs, share_prefix: bool) -> None:
    rows = examples(pairs)
    names = [10 + i for i in range(len(rows))]
    micros = micro_batches([Group(3, 0, rows, names)], 40, share_prefix=share_prefix)
    pieces = [piece for micro in micros for piece in micro.pieces]
    assert sorted(piece.name for piece in pieces) == names
    assert {piece.slot for piece in pieces} == {3}
    if not share_prefix:
        assert sorted(p.stop - p.start for p in pieces) == sorted(map(input_length, rows))
    for micro in micros:
        assert max(piece.stop for piece in micro.pieces) == micro.batch.input_ids.shape[1]


def test_rows_that_begin_alike_share_a_sequence() -> None:
    prefix = tuple(range(1, 65))
    rows = [Example((*prefix, 100 + i, 200 + i), (300 + i, 7), 0) for i in range(8)]
    (micro,) = micro_batches([group(rows)], 10_000, share_prefix=True)
    assert micro.batch.input_ids.shape == (1, 64 + 8 * 3)
    assert micro.batch.places is not None
    assert micro.batch.places.shapes == ((8, 67),)
    assert micro.batch.input_ids[0, :67].tolist() == [*prefix, 100, 200, 300]
    assert micro.batch.position_ids is not None
    assert micro.batch.position_ids[0, 62:70].tolist() == [62, 63, 64, 65, 66, 64, 65, 66]


def test_a_row_over_the_packed_length_keeps_a_sequence_of_its_own() -> None:
    rows = [Example((*range(1, 5), *range(1000 * i, 1000 * i + n)), (7,), 0) for i, n in ((1, 4), (2, PACKED_LENGTH))]
    packed, alone = micro_batches([group(rows)], 10_000, share_prefix=True)
    assert packed.batch.input_ids.shape == (1, 8)
    assert alone.batch.input_ids.shape == (1, PACKED_LENGTH + 4)
    assert alone.batch.places is None


def test_a_tree_over_the_budget_is_cut_and_begins_anew() -> None:
    rows = [Example((*range(1, 11), 100 + i), (7,), 0) for i in range(6)]
    micros = micro_batches([group(rows)], 13, share_prefix=True)
    assert [micro.batch.input_ids.numel() for micro in micros] == [13, 13]


def test_trees_fill_the_room_that_larger_ones_leave() -> None:
    groups = [group([Example((9,) * n, (7,), 0)], slot) for slot, n in enumerate((4, 7, 5, 3))]
    micros = micro_batches(groups, 10, share_prefix=True)
    assert [(micro.slots.tolist(), micro.lengths) for micro in micros] == [([1, 3], (7, 3)), ([0, 2], (4, 5))]


def test_a_long_prompt_is_shared_where_sequences_may_be_longer() -> None:
    rows = [Example(tuple(range(1, 601)), (1000 + i, 7), 0) for i in range(4)]
    assert all(m.batch.places is None for m in micro_batches([group(rows)], 10_000, share_prefix=True))
    (micro,) = micro_batches([group(rows)], 10_000, share_prefix=True, longest=1000)
    assert micro.batch.input_ids.shape == (1, 604)


def test_company_does_not_change_how_rows_are_laid_out() -> None:
    own = group([Example((1, 2, 3, 4, 10 + i), (7, 8), 0) for i in range(6)], slot=1)
    other = group([Example(tuple(range(50, 80)), (9,), 0)] * 3, slot=0)
    (alone,) = micro_batches([own], 10_000, share_prefix=True)
    (together,) = micro_batches([other, own], 10_000, share_prefix=True)
    start = together.lengths[0]
    assert together.batch.input_ids[0, start:].tolist() == alone.batch.input_ids[0].tolist()


def test_a_group_over_the_budget_is_cut() -> None:
    rows = [Example((i, i, i, i), (7,), 0) for i in range(1, 8)]
    micros = micro_batches([group(rows)], 8, share_prefix=False)
    assert [tuple(m.batch.input_ids.shape) for m in micros] == [(2, 4)] * 3 + [(1, 4)]


def test_sequences_of_a_similar_length_share_a_micro_batch_whosever_they_are() -> None:
    groups = [group([Example((1,) * n, (7,), 0) for n in (3, 9)], slot) for slot in range(3)]
    micros = micro_batches(groups, 27, share_prefix=False)
    assert [(tuple(m.batch.input_ids.shape), m.slots.tolist(), m.lengths) for m in micros] == [
        ((3, 9), [0, 1, 2], (9, 9, 9)),
        ((3, 3), [0, 1, 2], (3, 3, 3)),
    ]


@pytest.mark.parametrize("share_prefix", [True, False])
def test_a_micro_batch_moves_to_a_device_whole(share_prefix: bool) -> None:
    rows = [Example((1, 2, 3, 4, 5), (i,), 0) for i in range(4)]
    (micro,) = micro_batches([group(rows)], 100, share_prefix=share_prefix)
    moved = micro.to(torch.device("meta"))
    tensors = [*moved.batch, *(moved.batch.places or ()), moved.slots, moved.tasks, moved.target_slots]
    assert {t.device.type for t in tensors if isinstance(t, torch.Tensor)} == {"meta"}
