"""Every mean, interval, difference, gap and verdict of an evaluation or a study; whatever shows one formats it only.

Tasks weigh alike: a figure is a mean over tasks of means over rows. A task on which a compared router failed is left
out for all of them, so that figures beside each other are over the same tasks.
"""

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import isfinite
from typing import Generic, Literal, TypeVar

import numpy as np

from lorary.evaluate.statistics import (
    RESAMPLES,
    FlipTest,
    Floats,
    flip_test,
    flipped_means,
    flipped_tasks,
    interval_of,
    resampled_means,
    tasks_interval,
)

Rows = Mapping[str, Sequence[float]]
Verdict = Literal["ahead", "behind", "level"]
ColumnT = TypeVar("ColumnT", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class MeanFigure:
    """A mean over tasks.

    Args:
        mean: the mean.
        low: lower end of its 95 % interval over rows: had other rows of these tasks been drawn.
        high: its upper end.
        tasks_low: the same over tasks: had other tasks like these been drawn; None with too few of them.
        tasks_high: its upper end.
        tasks: how many.
    """

    mean: float
    low: float
    high: float
    tasks_low: float | None
    tasks_high: float | None
    tasks: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A paired difference of two columns.

    Args:
        difference: mean over tasks of the mean difference over rows.
        low: lower end of the 95 % interval over rows; above 0 exactly where `p_rows` is below 0.05 and the difference
            above 0. Without rows enough to reject anything it is -1, and `high` 1.
        high: its upper end.
        p_rows: two-sided, had chance alone decided, row by row, which of the two does better.
        tasks_low: the same over tasks; None with too few tasks to reject anything.
        tasks_high: its upper end.
        p_tasks: the same task by task.
        verdict: of the interval over rows: a claim about these tasks.
        tasks_verdict: of the interval over tasks: a claim about tasks like these; None without the interval.
        tasks: how many.
        rows: how many in all.
    """

    difference: float
    low: float
    high: float
    p_rows: float
    tasks_low: float | None
    tasks_high: float | None
    p_tasks: float
    verdict: Verdict
    tasks_verdict: Verdict | None
    tasks: int
    rows: int

    @property
    def is_wider(self) -> bool:
        """Whether the verdict holds over tasks too."""
        return self.verdict != "level" and self.tasks_verdict == self.verdict


@dataclass(frozen=True, kw_only=True)
class GapClosed:
    """How much of the gap between the base and another column is closed: `gain / gap`.

    Args:
        gap: the other column less the base.
        gain: the column less the base.
        closed: 1 is the other column, 0 the base; None where the other column is not ahead of the base.
        low: lower end of its 95 % interval over rows; `high`, `tasks_low` and `tasks_high` as for `Difference`.
        tasks: how many.
        rows: how many in all.
    """

    gap: float
    gain: float
    closed: float | None
    low: float | None
    high: float | None
    tasks_low: float | None
    tasks_high: float | None
    tasks: int
    rows: int


def verdict_of(low: float, high: float) -> Verdict:
    """The one rule for a verdict: `ahead` or `behind` where the 95 % interval of a difference leaves 0 out."""
    return "ahead" if low > 0 else "behind" if high < 0 else "level"


def failed_tasks(
    scored: Collection[tuple[ColumnT, str]], failures: Iterable[tuple[ColumnT, str]]
) -> dict[str, list[ColumnT]]:
    """The one rule for failed cells: tasks to leave out of all figures, and the columns that failed on them.

    A column without any score is compared with nothing, so that its failures leave nothing out.

    Args:
        scored: column and task of every cell of a split.
        failures: column and task of what could not be scored of the split.
    """
    cells = set(scored)
    columns = {column for column, _ in cells}
    left_out: dict[str, list[ColumnT]] = {}
    for column, task in dict.fromkeys(failures):
        if column in columns and (column, task) not in cells:
            left_out.setdefault(task, []).append(column)
    return left_out


class Columns(Generic[ColumnT]):
    """Columns of values that are compared with each other. All share the draws of a task, so that any two are paired.

    Nothing depends on the order of columns or tasks.

    Args:
        values: one per row, by column and task.
    """

    def __init__(self, values: Mapping[ColumnT, Rows]) -> None:
        self._values = values
        self._resampled, self._flipped = cache(self._resample), cache(self._flip)

    def mean(self, column: ColumnT, tasks: Sequence[str]) -> MeanFigure:
        """The mean of a column over tasks that it has."""
        tasks = sorted(tasks)
        means = self._means(column, tasks)
        low, high = interval_of(self._resampled(tuple(tasks))[column])
        tasks_low, tasks_high = tasks_interval(means.tolist()) or (None, None)
        return MeanFigure(mean=float(means.mean()), low=low, high=high, tasks_low=tasks_low, tasks_high=tasks_high,
                          tasks=len(tasks))  # fmt: skip

    def difference(self, column: ColumnT, against: ColumnT, tasks: Sequence[str]) -> Difference:
        """A column minus another, over tasks of which both have the same rows."""
        tasks = sorted(tasks)
        means = self._means(column, tasks) - self._means(against, tasks)
        drawn = self._flipped(tuple(tasks))
        value, signs = float(means.mean()), drawn[column][:, 1]
        of_rows = flip_test(value, 1.0, drawn[column][:, 0] - drawn[against][:, 0], signs)
        of_tasks = flip_test(value, 1.0, *flipped_tasks(np.stack([means, np.ones(len(tasks))], axis=1)).T)
        # Values lie in 0..1, and so their differences in -1..1.
        low, high = max(of_rows.low, -1.0), min(of_rows.high, 1.0)
        wide = _ends(of_tasks)
        return Difference(
            difference=value,
            low=low,
            high=high,
            p_rows=of_rows.p,
            tasks_low=wide[0],
            tasks_high=wide[1],
            p_tasks=of_tasks.p,
            verdict=verdict_of(low, high),
            tasks_verdict=None if wide[0] is None or wide[1] is None else verdict_of(wide[0], wide[1]),
            tasks=len(tasks),
            rows=self._count(column, tasks),
        )

    def gap_closed(self, column: ColumnT, whole: ColumnT, base: ColumnT, tasks: Sequence[str]) -> GapClosed:
        """How much of the gap between base and `whole` a column closes, over tasks of which all have the same rows."""
        tasks = sorted(tasks)
        gaps, gains = (self._means(compared, tasks) - self._means(base, tasks) for compared in (whole, column))
        gap, gain = float(gaps.mean()), float(gains.mean())
        closed, narrow, wide = None, _NONE, _NONE
        if self.difference(whole, base, tasks).verdict == "ahead":
            drawn = self._flipped(tuple(tasks))
            gain_flipped, gap_flipped = (drawn[compared][:, 0] - drawn[base][:, 0] for compared in (column, whole))
            closed, narrow = gain / gap, _ends(flip_test(gain, gap, gain_flipped, gap_flipped))
            wide = _ends(flip_test(gain, gap, *flipped_tasks(np.stack([gains, gaps], axis=1)).T))
        return GapClosed(gap=gap, gain=gain, closed=closed, low=narrow[0], high=narrow[1], tasks_low=wide[0],
                         tasks_high=wide[1], tasks=len(tasks), rows=self._count(column, tasks))  # fmt: skip

    def _means(self, column: ColumnT, tasks: Sequence[str]) -> Floats:
        """(tasks,) means."""
        return np.array([np.mean(self._values[column][task], dtype=np.float64) for task in tasks])

    def _count(self, column: ColumnT, tasks: Sequence[str]) -> int:
        return sum(len(self._values[column][task]) for task in tasks)

    def _having(self, tasks: Sequence[str]) -> list[ColumnT]:
        return [column for column, rows in self._values.items() if all(task in rows for task in tasks)]

    def _alike(self, task: str, columns: Sequence[ColumnT]) -> list[list[ColumnT]]:
        """Columns of as many rows of a task stand together: they share their draws."""
        groups: dict[int, list[ColumnT]] = {}
        for column in columns:
            groups.setdefault(len(self._values[column][task]), []).append(column)
        return list(groups.values())

    def _resample(self, tasks: tuple[str, ...]) -> dict[ColumnT, Floats]:
        """For every column with all of these tasks (RESAMPLES,) means over tasks of rows drawn with replacement."""
        drawn = {column: np.zeros(RESAMPLES) for column in self._having(tasks)}
        for task in tasks:
            for alike in self._alike(task, list(drawn)):
                means = resampled_means(task, np.array([self._values[column][task] for column in alike]).T)
                for number, column in enumerate(alike):
                    drawn[column] += means[:, number] / len(tasks)
        return drawn

    def _flip(self, tasks: tuple[str, ...]) -> dict[ColumnT, Floats]:
        """(throws, 2) means after the rows' signs were thrown: those of the values, and those of the signs alone.

        The last throw flips nothing.
        """
        drawn = {column: np.zeros((RESAMPLES + 1, 2)) for column in self._having(tasks)}
        for task in tasks:
            for alike in self._alike(task, list(drawn)):
                values = [self._values[column][task] for column in alike]
                rows = np.array([*values, np.ones(len(values[0]))]).T
                means = np.concatenate([flipped_means(task, rows), rows.mean(axis=0, keepdims=True)]) / len(tasks)
                for number, column in enumerate(alike):
                    drawn[column] += means[:, [number, -1]]
        return drawn


_Ends = tuple[float | None, float | None]
_NONE: _Ends = (None, None)


def _ends(test: FlipTest) -> _Ends:
    """The interval, None where it has no ends."""
    return (test.low, test.high) if isfinite(test.low) and isfinite(test.high) else _NONE
