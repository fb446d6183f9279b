"""Bootstrap intervals."""

import numpy as np
import pytest

from lorary.evaluate.statistics import bootstrap_interval, stratified_interval


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


def test_groups_weigh_alike_whatever_their_size() -> None:
    low, high = stratified_interval([[1.0] * 100, [0.0] * 2])
    assert (low, high) == (0.5, 0.5)


def test_rows_are_resampled_inside_their_group() -> None:
    # Between groups everything differs, inside nothing: resampling across groups would give a wide interval.
    low, high = stratified_interval([[0.0] * 10, [10.0] * 10])
    assert (low, high) == pytest.approx((5.0, 5.0))
