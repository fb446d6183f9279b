"""Intervals and p-values by resampling."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorary.evaluate.statistics import (
    FEWEST_TASKS,
    LEVEL,
    FlipTest,
    bootstrap_interval,
    flip_test,
    flipped_means,
    flipped_tasks,
    interval_of,
    resampled_means,
    tasks_interval,
)


def over_rows(values: np.ndarray, seed: int = 0) -> FlipTest:
    """Test and interval of a mean difference over rows."""
    both = np.stack([values, np.ones(len(values))], axis=1)
    flipped = np.concatenate([flipped_means("a", both, seed), both.mean(axis=0, keepdims=True)])
    return flip_test(float(values.mean()), 1.0, *flipped.T)


def over_tasks(values: list[float], seed: int = 0) -> FlipTest:
    """The same over tasks."""
    flipped = flipped_tasks(np.stack([values, np.ones(len(values))], axis=1), seed)
    return flip_test(float(np.mean(values)), 1.0, *flipped.T)


def test_an_interval_of_equal_values_is_a_point() -> None:
    assert bootstrap_interval([0.25] * 9) == (0.25, 0.25)


def test_an_interval_is_the_same_for_the_same_seed_and_holds_the_mean() -> None:
    values = [float(i % 3 == 0) for i in range(40)]
    low, high = bootstrap_interval(values, seed=3)
    assert (low, high) == bootstrap_interval(values, seed=3)
    assert low < sum(values) / 40 < high


def test_about_95_of_100_intervals_hold_the_true_mean() -> None:
    random = np.random.default_rng(0)
    inside = 0
    for trial in range(200):
        low, high = bootstrap_interval(random.normal(1.0, 2.0, size=60).tolist(), seed=trial)
        inside += low <= 1.0 <= high
    assert 0.88 <= inside / 200 <= 0.99


def test_columns_share_their_draws_and_tasks_do_not() -> None:
    random = np.random.default_rng(1)
    one, noise = random.normal(size=30), random.normal(size=30)
    both = resampled_means("a", np.stack([one, one + 2], axis=1))
    assert both[:, 1] - both[:, 0] == pytest.approx(2.0)
    other = resampled_means("b", np.stack([one, noise], axis=1))
    assert abs(np.corrcoef(both[:, 0], other[:, 0])[0, 1]) < 0.1


def test_chance_gives_small_p_values_as_seldom_as_they_say() -> None:
    random = np.random.default_rng(2)
    found = []
    for trial in range(300):
        found.append(over_rows(random.choice([-1.0, 0.0, 1.0], size=40), seed=trial).p)
    assert 0.01 <= np.mean(np.array(found) <= 0.05) <= 0.1
    assert min(found) > 0


def test_a_clear_difference_of_rows_has_a_small_p_value_and_none_has_1() -> None:
    values = np.ones(30)
    assert over_rows(values).p < 0.001
    assert over_rows(0 * values).p == 1.0


def test_the_p_value_over_tasks_counts_all_patterns_of_signs() -> None:
    assert over_tasks([0.3]).p == 1.0  # one task says nothing of others
    assert over_tasks([0.1, 0.2, 0.3, 0.1, 0.2]).p == 2 / 2**5
    assert over_tasks([-0.1, -0.2, -0.3, -0.1, -0.2]).p == 2 / 2**5
    assert over_tasks([1.0, -1.0]).p == 1.0
    assert over_tasks([0.2] * 40).p < 0.001


def test_an_interval_over_tasks_needs_tasks_and_is_wider_than_one_over_rows() -> None:
    means = [0.1, 0.9, 0.3, 0.7, 0.5, 0.2]
    assert tasks_interval(means[: FEWEST_TASKS - 1]) is None
    found = tasks_interval(means)
    assert found is not None
    rows = sum(resampled_means(str(i), np.full((50, 1), mean))[:, 0] for i, mean in enumerate(means)) / len(means)
    low, high = interval_of(rows)
    assert found[0] < low - 0.1
    assert found[1] > high + 0.1


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(["binary", "real", "few values"]),
    rows=st.integers(1, 60),
    shift=st.floats(-1, 1),
    seed=st.integers(0, 10_000),
)
def test_an_interval_leaves_zero_out_exactly_where_p_is_small(kind: str, rows: int, shift: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    values = random.normal(shift, 1, size=rows)
    if kind != "real":
        values = np.clip(np.round(values), -1, 1) / (1 if kind == "binary" else 3)
    tests = [over_rows(values, seed), over_tasks(values.tolist(), seed)]
    for found in tests:
        assert (found.low > 0 or found.high < 0) == (found.p < 1 - LEVEL)
        assert found.low <= values.mean() + 1e-9
        assert found.high >= values.mean() - 1e-9


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 30), seed=st.integers(0, 10_000))
def test_an_interval_holds_exactly_what_the_test_does_not_reject(rows: int, seed: int) -> None:
    values = np.random.default_rng(seed).choice([-1.0, 0.0, 0.5, 1.0], size=rows)
    found = over_rows(values)
    for x in (-0.9, -0.31, 0.013, 0.2, 0.77):
        if min(abs(x - found.low), abs(x - found.high)) > 1e-6:
            assert (found.low <= x <= found.high) == (over_rows(values - x).p >= 1 - LEVEL)


def test_about_95_of_100_intervals_of_a_difference_hold_the_true_one() -> None:
    random = np.random.default_rng(4)
    inside, of_tasks = 0, 0
    for trial in range(300):
        found, wide = over_rows(random.normal(0.3, 1.0, size=25), trial), over_tasks(random.normal(0.3, 1, 8).tolist())
        inside += found.low <= 0.3 <= found.high
        of_tasks += wide.low <= 0.3 <= wide.high
    assert 0.92 <= inside / 300 <= 0.98
    assert 0.92 <= of_tasks / 300 <= 0.98


def test_too_few_to_reject_anything_bound_nothing() -> None:
    # Of five, no pattern of signs is rarer than 2 / 2^5.
    assert over_tasks([0.3] * 5) == (2 / 2**5, -np.inf, np.inf)
    assert over_tasks([0.3] * 6) == (2 / 2**6, pytest.approx(0.3), pytest.approx(0.3))


def test_the_interval_of_a_ratio_scales_with_its_unit() -> None:
    values = np.random.default_rng(6).normal(1, 1, size=(12, 1))
    flipped = flipped_tasks(np.hstack([values, np.ones_like(values)]))
    mean = float(values.mean())
    one, four = (flip_test(mean, unit, flipped[:, 0], unit * flipped[:, 1]) for unit in (1.0, 4.0))
    assert (four.low, four.high, four.p) == (pytest.approx(one.low / 4), pytest.approx(one.high / 4), one.p)
