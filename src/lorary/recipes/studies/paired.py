"""Paired comparison of two columns: row by row inside each task, tasks weighted alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lorary.evaluate.statistics import RESAMPLES, stratified_interval

Values = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Paired:
    """A difference of two means over the tasks that both have.

    Args:
        difference: mean over tasks of the mean difference over rows.
        low: lower end of its 95 % interval.
        high: upper end.
        p: two-sided, from flipping the signs of the rows' differences at random.
        tasks: how many.
        rows: how many in all.
    """

    difference: float
    low: float
    high: float
    p: float
    tasks: int
    rows: int

    @property
    def verdict(self) -> str:
        """`ahead`, `behind`, or `level` where the interval holds zero."""
        if self.low > 0:
            return "ahead"
        return "behind" if self.high < 0 else "level"


def paired(values: Values, against: Values) -> Paired | None:
    """Compare two columns.

    Args:
        values: one per test row, by task; rows are the first ones of the task, so that the shorter list decides.
        against: the other column.

    Returns:
        The difference; None where they share no task.
    """
    groups = [differences(values[task], against[task]) for task in sorted(set(values) & set(against))]
    if not groups:
        return None
    low, high = stratified_interval(groups)
    mean = sum(sum(group) / len(group) for group in groups) / len(groups)
    return Paired(mean, low, high, sign_flip_p(groups), len(groups), sum(map(len, groups)))


def differences(values: Sequence[float], against: Sequence[float]) -> list[float]:
    """Row by row, as far as both go."""
    return [x - y for x, y in zip(values, against, strict=False)]


def sign_flip_p(groups: Sequence[Sequence[float]], seed: int = 0) -> float:
    """Two-sided p-value of a mean of group means: were the two columns alike, each difference could have either sign.

    Args:
        groups: for each task, one difference per row.
        seed: of the random signs.
    """
    random = np.random.default_rng(seed)
    means, observed = np.zeros(RESAMPLES), 0.0
    for group in groups:
        values = np.asarray(group, dtype=np.float64)
        signs = random.integers(0, 2, size=(RESAMPLES, len(values))) * 2 - 1
        means += (signs * values).mean(axis=1)
        observed += values.mean()
    # Sums in another order may differ in the last bits: a tie must count, or p comes out too small.
    return (1 + int((np.abs(means) >= abs(observed) - 1e-12).sum())) / (1 + RESAMPLES)


@dataclass(frozen=True)
class Share:
    """The part of a gain that is kept, 1 for all of it.

    Args:
        share: gain of the column over gain of the whole, means over tasks.
        low: lower end of its 95 % interval.
        high: upper end.
        gain: of the column over the base.
        whole: of the whole over the base.
        tasks: how many.
        rows: how many in all.
    """

    share: float
    low: float
    high: float
    gain: float
    whole: float
    tasks: int
    rows: int


def share_of_gain(values: Values, whole: Values, base: Values, seed: int = 0) -> Share | None:
    """How much of the gain of `whole` over the base a column keeps.

    Args:
        values: of the column, one per row, by task.
        whole: of the column whose gain is the whole.
        base: of the base.
        seed: of the resampling; the same rows are drawn for all three.

    Returns:
        The share; None where they share no task, or the whole gains nothing that its rows could show.
    """
    tasks = sorted(set(values) & set(whole) & set(base))
    if not tasks:
        return None
    random, sums, observed, rows = np.random.default_rng(seed), np.zeros((2, RESAMPLES)), np.zeros(2), 0
    for task in tasks:
        length = min(len(column[task]) for column in (values, whole, base))
        own, all_of_it, floor = (np.asarray(column[task][:length]) for column in (values, whole, base))
        gains = np.stack([own - floor, all_of_it - floor])  # (2, rows)
        sums += gains[:, random.integers(0, length, size=(RESAMPLES, length))].mean(axis=-1)
        observed += gains.mean(axis=-1)
        rows += length
    if np.quantile(sums[1], 0.025) <= 0:
        return None
    low, high = np.quantile(sums[0] / sums[1], [0.025, 0.975])
    gain, total = observed / len(tasks)
    return Share(float(gain / total), float(low), float(high), float(gain), float(total), len(tasks), rows)
