"""Intervals and p-values by resampling."""

import numpy as np
import pytest

from lorary.evaluate.statistics import (
    FEWEST_TASKS,
    bootstrap_interval,
    flipped_means,
    interval_of,
    p_value,
    resampled_means,
    tasks_interval,
    tasks_p_value,
)


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
        values = random.choice([-1.0, 0.0, 1.0], size=(40, 1))
        found.append(p_value(float(values.mean()), flipped_means("a", values, seed=trial)[:, 0]))
    assert 0.01 <= np.mean(np.array(found) <= 0.05) <= 0.1
    assert min(found) > 0


def test_a_clear_difference_of_rows_has_a_small_p_value_and_none_has_1() -> None:
    values = np.ones((30, 1))
    assert p_value(1.0, flipped_means("a", values)[:, 0]) < 0.001
    assert p_value(0.0, flipped_means("a", 0 * values)[:, 0]) == 1.0


def test_the_p_value_over_tasks_counts_all_patterns_of_signs() -> None:
    assert tasks_p_value([0.3]) == 1.0  # one task says nothing of others
    assert tasks_p_value([0.1, 0.2, 0.3, 0.1, 0.2]) == 2 / 2**5
    assert tasks_p_value([-0.1, -0.2, -0.3, -0.1, -0.2]) == 2 / 2**5
    assert tasks_p_value([1.0, -1.0]) == 1.0
    assert tasks_p_value([0.2] * 40) < 0.001


def test_an_interval_over_tasks_needs_tasks_and_is_wider_than_one_over_rows() -> None:
    means = [0.1, 0.9, 0.3, 0.7, 0.5, 0.2]
    assert tasks_interval(means[: FEWEST_TASKS - 1]) is None
    found = tasks_interval(means)
    assert found is not None
    rows = sum(resampled_means(str(i), np.full((50, 1), mean))[:, 0] for i, mean in enumerate(means)) / len(means)
    low, high = interval_of(rows)
    assert found[0] < low - 0.1
    assert found[1] > high + 0.1
