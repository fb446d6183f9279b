"""Paired comparison of two columns: row by row inside each task, tasks weighted alike."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lorary.evaluate.statistics import (
    Floats,
    flipped_means,
    interval_of,
    p_value,
    resampled_means,
    tasks_interval,
    tasks_p_value,
)

Values = Mapping[str, Sequence[float]]
SURE = 0.05


@dataclass(frozen=True)
class Paired:
    """A difference of two means over the tasks that both have.

    Args:
        difference: mean over tasks of the mean difference over rows.
        low: lower end of its 95 % interval over rows: had other rows of these tasks been drawn.
        high: its upper end.
        tasks_low: the same over tasks: had other tasks like these been drawn; None with too few of them.
        tasks_high: its upper end.
        p: two-sided, over rows: had chance alone decided, row by row, which of the two does better.
        p_tasks: the same task by task.
        tasks: how many.
        rows: how many in all.
    """

    difference: float
    low: float
    high: float
    tasks_low: float | None
    tasks_high: float | None
    p: float
    p_tasks: float
    tasks: int
    rows: int

    @property
    def verdict(self) -> str:
        """`ahead` or `behind` where the interval over rows leaves zero out and p is small; else `level`."""
        if self.p > SURE or self.low <= 0 <= self.high:
            return "level"
        return "ahead" if self.low > 0 else "behind"

    @property
    def is_wider(self) -> bool:
        """Whether interval and p-value over tasks say the same: it would likely hold for other tasks of this kind."""
        if self.tasks_low is None or self.tasks_high is None:
            return False
        return self.p_tasks <= SURE and not self.tasks_low <= 0 <= self.tasks_high


def paired(values: Values, against: Values) -> Paired | None:
    """Compare two columns.

    Args:
        values: one per test row, by task; rows are the first ones of the task, so that the shorter list decides.
        against: the other column.

    Returns:
        The difference; None where they share no task.
    """
    tasks = sorted(set(values) & set(against))
    if not tasks:
        return None
    groups = {task: _differences(values[task], against[task]) for task in tasks}
    means = [float(group.mean()) for group in groups.values()]
    mean = sum(means) / len(means)
    low, high = interval_of(mean_of_tasks(groups, resampled_means)[:, 0])
    flipped = mean_of_tasks(groups, flipped_means)[:, 0]
    tasks_low, tasks_high = tasks_interval(means) or (None, None)
    rows = sum(len(group) for group in groups.values())
    p, p_tasks = p_value(mean, flipped), tasks_p_value(means)
    return Paired(mean, low, high, tasks_low, tasks_high, p, p_tasks, len(tasks), rows)


def mean_of_tasks(rows: Mapping[str, Floats], draw: Callable[[str, Floats], Floats]) -> Floats:
    """Means over tasks of means of drawn rows.

    Args:
        rows: (rows, columns) by task.
        draw: as `lorary.evaluate.statistics.resampled_means`.

    Returns:
        (resamples, columns).
    """
    return np.asarray(np.mean([draw(task, own) for task, own in rows.items()], axis=0))


def _differences(values: Sequence[float], against: Sequence[float]) -> Floats:
    length = min(len(values), len(against))
    return (np.asarray(values[:length], dtype=np.float64) - np.asarray(against[:length], dtype=np.float64))[:, None]


@dataclass(frozen=True)
class Share:
    """The part of a gain that is kept, 1 for all of it.

    Args:
        share: gain of the column over gain of the whole, means over tasks; None where the whole gains nothing that its
            rows could show.
        low: lower end of its 95 % interval over rows.
        high: upper end.
        gain: of the column over the base.
        whole: of the whole over the base.
        tasks: how many.
        rows: how many in all.
    """

    share: float | None
    low: float | None
    high: float | None
    gain: float
    whole: float
    tasks: int
    rows: int


def share_of_gain(values: Values, whole: Values, base: Values) -> Share | None:
    """How much of the gain of `whole` over the base a column keeps.

    Args:
        values: of the column, one per row, by task.
        whole: of the column whose gain is the whole.
        base: of the base.

    Returns:
        The share; None where they share no task.
    """
    tasks = sorted(set(values) & set(whole) & set(base))
    if not tasks:
        return None
    gains = {task: _gains(values[task], whole[task], base[task]) for task in tasks}
    gain, total = map(float, np.mean([rows.mean(axis=0) for rows in gains.values()], axis=0))
    number = sum(map(len, gains.values()))
    drawn = mean_of_tasks(gains, resampled_means)  # (resamples, 2)
    if interval_of(drawn[:, 1])[0] <= 0:
        return Share(None, None, None, gain, total, len(tasks), number)
    drawn = drawn[drawn[:, 1] > 0]
    low, high = interval_of(drawn[:, 0] / drawn[:, 1])
    return Share(gain / total, low, high, gain, total, len(tasks), number)


def _gains(values: Sequence[float], whole: Sequence[float], base: Sequence[float]) -> Floats:
    """Rows by (gain of the column, gain of the whole); rows are the first ones, so that the shortest list decides."""
    length = min(len(values), len(whole), len(base))
    return np.hstack([_differences(own[:length], base) for own in (values, whole)])
