"""Packed rows: every row finds its own tokens, at its own positions, and sees nothing else; no token comes twice."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorary.data.batching import input_length
from lorary.data.packing import Group, MicroBatch, micro_batches
from lorary.data.sharing import PACKED_LENGTH
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


def seen_rows(micro: MicroBatch) -> list[tuple[int, int, tuple[int, ...], int]]:
    """What each target is predicted from: (slot, task, the tokens it sees in the order of their positions, label)."""
    batch = micro.batch
    found = []
    for row, position, label in zip(*(t.tolist() for t in (batch.rows, batch.positions, batch.labels)), strict=True):
        if batch.mask is None or batch.position_ids is None:
            ids = batch.input_ids[row, : position + 1].tolist()
        else:
            seen = batch.mask[row, 0, position].nonzero()[:, 0]
            positions = batch.position_ids[row, seen]
            assert sorted(positions.tolist()) == list(range(len(seen)))
            assert positions.max() == batch.position_ids[row, position]
            ids = batch.input_ids[row, seen[positions.argsort()]].tolist()
        found.append((int(micro.slots[row]), int(micro.tasks[row]), tuple(ids), label))
    return found


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
        assert micro.target_slots.tolist() == micro.slots[micro.batch.rows].tolist()
        assert micro.slots.tolist() == sorted(micro.slots.tolist())
        assert len(micro.slots) == 1 or micro.batch.input_ids.numel() <= max_tokens


@fixed
@given(ROWS)
def test_a_packed_sequence_holds_no_token_twice(pairs: Pairs) -> None:
    for micro in micro_batches([group(examples(pairs))], 10_000, share_prefix=True):
        if micro.batch.mask is None:
            continue
        for sequence, mask in enumerate(micro.batch.mask[:, 0]):
            used = max(piece.stop for piece in micro.pieces if piece.sequence == sequence)
            ids, positions = micro.batch.input_ids[sequence], micro.batch.position_ids[sequence]  # type: ignore[index]
            seen = [mask[q].nonzero()[:, 0] for q in range(used)]
            paths = [tuple(ids[s[positions[s].argsort()]].tolist()) for s in seen]
            assert len(set(paths)) == used


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
    assert micro.batch.input_ids[0, :67].tolist() == [*prefix, 100, 200, 300]
    assert micro.batch.position_ids is not None
    assert micro.batch.position_ids[0, 62:70].tolist() == [62, 63, 64, 65, 66, 64, 65, 66]


def test_rows_with_nothing_in_common_need_no_mask() -> None:
    (micro,) = micro_batches([group([Example((i, 5), (6,), 0) for i in range(4)])], 10_000, share_prefix=True)
    assert micro.batch.input_ids.shape == (4, 2)
    assert micro.batch.mask is None


def test_long_sequences_are_cut_where_attention_would_cost_more_than_it_saves() -> None:
    rows = [Example((*range(1, 21), *range(1000 * i, 1000 * i + 60)), (7,), 0) for i in range(1, 33)]
    micros = micro_batches([group(rows)], 10_000, share_prefix=True)
    lengths = [micro.batch.input_ids.shape[1] for micro in micros]
    assert sum(len(micro.slots) for micro in micros) > 4
    assert max(lengths) < PACKED_LENGTH
    long = [Example((*range(1, 5), *range(1000 * i, 1000 * i + 400)), (7,), 0) for i in range(1, 9)]
    assert all(m.batch.mask is None for m in micro_batches([group(long)], 10_000, share_prefix=True))


def test_a_long_prompt_is_shared_where_sequences_may_be_longer() -> None:
    rows = [Example(tuple(range(1, 601)), (1000 + i, 7), 0) for i in range(4)]
    assert all(m.batch.mask is None for m in micro_batches([group(rows)], 10_000, share_prefix=True))
    (micro,) = micro_batches([group(rows)], 10_000, share_prefix=True, longest=1000)
    assert micro.batch.input_ids.shape == (1, 604)


def test_company_does_not_change_how_rows_are_laid_out() -> None:
    own = group([Example((1, 2, 3, 4, 10 + i), (7, 8), 0) for i in range(6)], slot=1)
    other = group([Example(tuple(range(50, 80)), (9,), 0)] * 3, slot=0)
    (alone,) = micro_batches([own], 10_000, share_prefix=True)
    together = micro_batches([other, own], 10_000, share_prefix=True)
    shapes = [
        (int((micro.slots == 1).sum()), max((p.stop for p in micro.pieces if p.slot == 1), default=0))
        for micro in together
    ]
    assert (1, alone.batch.input_ids.shape[1]) in shapes


def test_a_group_over_the_budget_is_cut() -> None:
    rows = [Example((i, i, i, i), (7,), 0) for i in range(1, 8)]
    micros = micro_batches([group(rows)], 8, share_prefix=False)
    assert [tuple(m.batch.input_ids.shape) for m in micros] == [(2, 4)] * 3 + [(1, 4)]


def test_sequences_of_a_similar_length_share_a_micro_batch_whosever_they_are() -> None:
    groups = [group([Example((1,) * n, (7,), 0) for n in (3, 9)], slot) for slot in range(3)]
    micros = micro_batches(groups, 27, share_prefix=False)
    assert [(tuple(m.batch.input_ids.shape), m.slots.tolist()) for m in micros] == [
        ((3, 9), [0, 1, 2]),
        ((3, 3), [0, 1, 2]),
    ]


@pytest.mark.parametrize("share_prefix", [True, False])
def test_a_micro_batch_moves_to_a_device_whole(share_prefix: bool) -> None:
    rows = [Example((1, 2, 3, 4, 5), (i,), 0) for i in range(4)]
    (micro,) = micro_batches([group(rows)], 100, share_prefix=share_prefix)
    moved = micro.to(torch.device("meta"))
    tensors = [*moved.batch, moved.slots, moved.tasks, moved.target_slots]
    assert {t.device.type for t in tensors if t is not None} == {"meta"}
