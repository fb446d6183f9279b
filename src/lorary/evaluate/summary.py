"""What follows from cells: means, paired comparisons, the gap to the oracle, and where the base does better."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from lorary.evaluate.cells import BASE, MIXED, ORACLE, SPLITS, Cell, Column, columns_of, libraries_of, primary_cells
from lorary.evaluate.statistics import (
    RESAMPLES,
    Floats,
    drawn_tasks,
    flipped_means,
    interval_of,
    p_value,
    resampled_means,
    tasks_interval,
    tasks_p_value,
)


@dataclass(frozen=True)
class Mean:
    """Mean primary value of a router over the tasks of a split, tasks weighted alike.

    Args:
        low: lower end of the 95 % interval over rows, those of each task drawn anew.
        high: its upper end.
        tasks_low: lower end of the 95 % interval over tasks, whole tasks drawn anew; None with too few of them.
        tasks_high: its upper end.
    """

    library: str
    router: str
    split: str
    mean: float
    low: float
    high: float
    tasks_low: float | None
    tasks_high: float | None
    tasks: int


@dataclass(frozen=True)
class Comparison:
    """A paired difference of two routers over the tasks of a split: mean of task means, rows paired.

    Args:
        library: of the router.
        against_library: of the other one; None for the base, which belongs to none.
        low: lower end of the 95 % interval over rows; `high`, `tasks_low`, `tasks_high` as for `Mean`.
        p_rows: two-sided p-value over rows: had chance alone decided, row by row, which of the two does better.
        p_tasks: the same task by task.
        tasks: how many.
    """

    router: str
    against: str
    split: str
    difference: float
    low: float
    high: float
    tasks: int
    library: str
    against_library: str | None
    tasks_low: float | None
    tasks_high: float | None
    p_rows: float
    p_tasks: float


@dataclass(frozen=True)
class OracleGap:
    """How much of what the oracle gains over the base a router gains: (router - base) / (oracle - base) of the means.

    Args:
        gap: oracle - base.
        closed: 1 is the oracle, 0 the base; None where the interval of the gap over rows reaches down to 0.
        low: lower end of the 95 % interval over rows; `high`, `tasks_low`, `tasks_high` as for `Mean`.
        tasks: how many.
    """

    library: str
    router: str
    split: str
    gap: float
    closed: float | None
    low: float | None
    high: float | None
    tasks_low: float | None
    tasks_high: float | None
    tasks: int


class Summary:
    """Everything that is computed from cells.

    Args:
        cells: of one or more libraries over one base.
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._cells = cells
        self.columns = columns_of(cells)
        self._primary = primary_cells(cells)
        # Of the base, which counts once, the split depends on the library that it stands beside.
        self._split = {(cell.library, cell.task): cell.split for cell in cells if cell.primary}
        self._drawn = cache(self._draw)

    def means(self) -> list[Mean]:
        """The mean of every router, the base once for each library, on each split."""
        found = []
        for library in libraries_of(self._cells):
            for column in self.columns:
                if column.library not in (None, library):
                    continue
                for split in SPLITS:
                    tasks = tuple(task for task in self._tasks(column) if self._split.get((library, task)) == split)
                    if tasks:
                        values = self._values(column, tasks)
                        low, high = interval_of(self._drawn(tasks, False)[column])
                        wide = tasks_interval(values.tolist()) or (None, None)
                        mean = float(values.mean())
                        found.append(Mean(library, column.router, split, mean, low, high, wide[0], wide[1], len(tasks)))
        return found

    def comparisons(self) -> list[Comparison]:
        """Every two routers of one library, the base among them, and the same router in every two libraries."""
        found = []
        for i, column in enumerate(self.columns):
            for other in self.columns[:i]:
                if other.library in (None, column.library) or other.router == column.router:
                    for split in (*SPLITS, MIXED):
                        tasks = self._paired(column, other, split)
                        if tasks:
                            found.append(self._compare(column, other, split, tasks))
        return found

    def oracle_gaps(self) -> list[OracleGap]:
        """For each router that is neither base nor oracle, how far it comes, on each split."""
        base, found = Column(None, BASE), []
        for column in self.columns:
            oracle = Column(column.library, ORACLE)
            if column in (base, oracle):
                continue
            for split in SPLITS:
                paired = set(self._paired(oracle, base, split))
                tasks = tuple(task for task in self._paired(column, base, split) if task in paired)
                if tasks:
                    found.append(self._gap(column, oracle, base, split, tasks))
        return found

    def base_guard(self) -> list[dict[str, Any]]:
        """Every task on which the base alone beats a router, by name."""
        found = []
        for (column, task), cell in self._primary.items():
            base = self._primary.get((Column(None, BASE), task))
            if column.router != BASE and base is not None and base.value > cell.value:
                entry = {"library": cell.library, "task": task, "router": cell.router, "split": cell.split}
                found.append({**entry, "metric": cell.metric, "base": base.value, "value": cell.value})
        return found

    def _tasks(self, column: Column) -> list[str]:
        return [task for own, task in self._primary if own == column]

    def _values(self, column: Column, tasks: Sequence[str]) -> Floats:
        """(tasks,) means."""
        return np.array([self._primary[column, task].value for task in tasks])

    def _paired(self, column: Column, other: Column, split: str) -> tuple[str, ...]:
        """Tasks of a split that both were scored on, over the same rows and by the same metric."""
        return tuple(
            task
            for task in self._tasks(column)
            if (against := self._primary.get((other, task))) is not None
            and _is_same_question(self._primary[column, task], against)
            and self._common_split(column, other, task) == split
        )

    def _common_split(self, column: Column, other: Column, task: str) -> str:
        splits = {self._split[library, task] for library in (column.library, other.library) if library is not None}
        return splits.pop() if len(splits) == 1 else MIXED

    def _draw(self, tasks: tuple[str, ...], flip: bool) -> dict[Column, Floats]:
        """For every column with cells on all of these tasks, means over the tasks of resampled rows.

        Rows are drawn with replacement, or keep their place and have their signs thrown.
        """
        draw = flipped_means if flip else resampled_means
        found = {c: np.zeros(RESAMPLES) for c in self.columns if all((c, task) in self._primary for task in tasks)}
        for task in tasks:
            for alike in _by_rows({column: self._primary[column, task].values for column in found}):
                means = draw(task, np.array(list(alike.values())).T) / len(tasks)
                for number, column in enumerate(alike):
                    found[column] += means[:, number]
        return found

    def _compare(self, column: Column, other: Column, split: str, tasks: tuple[str, ...]) -> Comparison:
        differences = self._values(column, tasks) - self._values(other, tasks)
        difference = float(differences.mean())
        drawn, flipped = (self._drawn(tasks, flip) for flip in (False, True))
        low, high = interval_of(drawn[column] - drawn[other])
        wide = tasks_interval(differences.tolist()) or (None, None)
        assert column.library is not None
        return Comparison(
            router=column.router,
            against=other.router,
            split=split,
            difference=difference,
            low=low,
            high=high,
            tasks=len(tasks),
            library=column.library,
            against_library=other.library,
            tasks_low=wide[0],
            tasks_high=wide[1],
            p_rows=p_value(difference, flipped[column] - flipped[other]),
            p_tasks=tasks_p_value(differences.tolist()),
        )

    def _gap(self, column: Column, oracle: Column, base: Column, split: str, tasks: tuple[str, ...]) -> OracleGap:
        three = (column, oracle, base)
        drawn = np.stack([self._drawn(tasks, False)[each] for each in three], axis=1)
        values = np.stack([self._values(each, tasks) for each in three], axis=1)  # (tasks, 3)
        own, best, bare = values.mean(axis=0)
        gap = float(best - bare)
        assert column.library is not None
        who = (column.library, column.router, split, gap)
        if interval_of(drawn[:, 1] - drawn[:, 2])[0] <= 0:
            return OracleGap(*who, None, None, None, None, None, len(tasks))
        picked = drawn_tasks(len(tasks))
        low, high = _ratio_interval(drawn)
        wide = (None, None) if picked is None else _ratio_interval(values[picked].mean(axis=1))
        return OracleGap(*who, float((own - bare) / gap), low, high, wide[0], wide[1], len(tasks))


def _by_rows(values: Mapping[Column, Sequence[float]]) -> list[dict[Column, Sequence[float]]]:
    """Columns of as many rows stand together: they share their draws."""
    groups: dict[int, dict[Column, Sequence[float]]] = {}
    for column, own in values.items():
        groups.setdefault(len(own), {})[column] = own
    return list(groups.values())


def _is_same_question(one: Cell, other: Cell) -> bool:
    return (one.metric, one.n, one.data) == (other.metric, other.n, other.data)


def _ratio_interval(means: Floats) -> tuple[float, float] | tuple[None, None]:
    """Percentile interval of the closed gap over drawn means of router, oracle and base; None without a gap in most.

    Draws without a gap say nothing of its share and are left out: fewer than one in 40 where its interval lies above 0.
    """
    gap = means[:, 1] - means[:, 2]
    kept = means[gap > 1e-9]
    if len(kept) < 0.9 * len(means):
        return None, None
    return interval_of((kept[:, 0] - kept[:, 2]) / (kept[:, 1] - kept[:, 2]))
