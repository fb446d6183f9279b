"""Batches whose tasks are drawn by weight: shares as asked for, rows in permuted epochs, order by key alone."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorary.data.batching import BLOCK, plan_weighted_batches

LENGTHS = [(7 * i) % 11 + 1 for i in range(23)]
TASKS = [0] * 15 + [1] * 5 + [2] * 3


def test_tasks_come_in_proportion_to_their_weights_and_not_to_their_rows() -> None:
    batches = plan_weighted_batches(LENGTHS, TASKS, [1.0, 3.0, 6.0], 10, 400, 0, "x")
    shares = Counter(TASKS[row] for batch in batches for row in batch)
    assert [shares[task] / 4000 for task in range(3)] == pytest.approx([0.1, 0.3, 0.6], abs=0.03)
    assert batches == plan_weighted_batches(LENGTHS, TASKS, [10.0, 30.0, 60.0], 10, 400, 0, "x")


@given(st.lists(st.floats(0.01, 100), min_size=3, max_size=3), st.integers(1, 9), st.integers(1, 30), st.integers(0, 9))
def test_rows_of_a_task_come_in_permuted_epochs(
    weights: list[float], batch_size: int, num_steps: int, seed: int
) -> None:
    batches = plan_weighted_batches(LENGTHS, TASKS, weights, batch_size, num_steps, seed)
    assert [len(batch) for batch in batches] == [batch_size] * num_steps
    counts = Counter(row for batch in batches for row in batch)
    for task in range(3):
        seen = [counts[row] for row in range(len(TASKS)) if TASKS[row] == task]
        assert max(seen) - min(seen) <= 1


def test_batches_of_a_block_hold_rows_of_similar_length() -> None:
    batches = plan_weighted_batches(LENGTHS, TASKS, [1.0, 1.0, 1.0], 4, BLOCK, "x")
    spans = sorted((min(LENGTHS[row] for row in batch), max(LENGTHS[row] for row in batch)) for batch in batches)
    assert all(before[1] <= after[0] for before, after in pairwise(spans))


def test_the_order_depends_on_the_key() -> None:
    one, other = (plan_weighted_batches(LENGTHS, TASKS, [1.0, 1.0, 1.0], 4, 5, 0, name) for name in "ab")
    assert one != other
    assert one == plan_weighted_batches(LENGTHS, TASKS, [1.0, 1.0, 1.0], 4, 5, 0, "a")
