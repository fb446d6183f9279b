"""Batches: the order of rows depends on the key alone, every row comes once an epoch, padding is bounded."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorary.data.batching import collate, input_length, length_buckets, plan_batches
from lorary.data.template import Example
from lorary.errors import TaskError

fixed = settings(max_examples=60)
LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=30)


def test_rows_are_padded_on_the_right_and_targets_are_where_they_are_predicted() -> None:
    batch = collate([Example((5, 6), (7, 8, 9), 0), Example((3,), (4,), 0)], pad_id=99)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [3, 99, 99, 99]]
    assert batch.rows.tolist() == [0, 0, 0, 1]
    assert batch.positions.tolist() == [1, 2, 3, 0]
    assert batch.labels.tolist() == [7, 8, 9, 4]
    assert input_length(Example((5, 6), (7, 8, 9), 0)) == 4


def test_a_padding_id_that_is_a_target_too_is_learnt() -> None:
    assert collate([Example((5,), (7, 0), 0), Example((5, 6, 7), (0,), 0)]).labels.tolist() == [7, 0, 0]


@fixed
@given(LENGTHS, st.integers(1, 7), st.integers(1, 40))
def test_every_row_comes_once_an_epoch(lengths: list[int], batch_size: int, num_steps: int) -> None:
    plan = plan_batches(lengths, batch_size, num_steps, 0, "sst2")
    assert [len(batch) for batch in plan] == [batch_size] * num_steps
    counts = Counter(row for batch in plan for row in batch)
    epochs, rest = divmod(batch_size * num_steps, len(lengths))
    assert sum(counts.values()) == batch_size * num_steps
    assert {counts[row] for row in range(len(lengths))} <= {epochs, epochs + 1}
    assert sum(counts[row] == epochs + 1 for row in range(len(lengths))) == rest


def test_the_order_depends_on_seed_and_name_alone() -> None:
    lengths = [3, 9, 4, 7, 5, 8, 6]
    first = plan_batches(lengths, 2, 20, 1, "sst2")
    torch.rand(5)
    assert plan_batches(lengths, 2, 20, 1, "sst2") == first
    assert plan_batches(lengths, 2, 20, 2, "sst2") != first
    assert plan_batches(lengths, 2, 20, 1, "boolq") != first


def test_rows_of_similar_length_share_a_batch_in_no_order_of_length() -> None:
    lengths = list(range(64))
    plan = plan_batches(lengths, 8, 8, 0, "a")
    assert all(max(batch) - min(batch) == 7 for batch in plan)
    assert [min(batch) for batch in plan] != sorted(min(batch) for batch in plan)


def test_a_task_without_rows_is_refused() -> None:
    with pytest.raises(TaskError, match="at least one row"):
        plan_batches([], 2, 3, 0, "a")


@fixed
@given(LENGTHS, st.integers(1, 120), st.one_of(st.none(), st.integers(1, 5)))
def test_buckets_hold_every_row_once_under_the_budget(
    lengths: list[int], max_tokens: int, max_rows: int | None
) -> None:
    buckets = length_buckets(lengths, max_tokens, max_rows)
    assert sorted(row for bucket in buckets for row in bucket) == list(range(len(lengths)))
    for bucket in buckets:
        assert len(bucket) == 1 or max(lengths[row] for row in bucket) * len(bucket) <= max_tokens
        assert max_rows is None or len(bucket) <= max_rows
    longest = [lengths[bucket[0]] for bucket in buckets]
    assert longest == sorted(longest, reverse=True)
