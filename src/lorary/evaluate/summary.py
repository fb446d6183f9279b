"""What follows from cells: means, paired comparisons, the gap to the oracle, and where the base does better."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorary.evaluate.cells import (
    BASE,
    ORACLE,
    Cell,
    CellFailure,
    Column,
    base_in,
    column_of,
    columns_of,
    grouped_tasks,
    is_base,
    libraries_of,
    primary_cells,
)
from lorary.evaluate.compare import Columns, Difference, GapClosed, MeanFigure, failed_tasks


@dataclass(frozen=True, kw_only=True)
class Mean(MeanFigure):
    """The mean primary value of a router over the tasks of a split, or what else it is a mean of.

    Args:
        library: of the router; the base stands with each of them.
        router: as it is written.
        split: `held_in`, `held_out` or `mixed`.
        family: of the tasks; None for all of them.
    """

    library: str
    router: str
    split: str
    family: str | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison(Difference):
    """A paired difference of two routers over the tasks of a split.

    Args:
        library: of the router.
        router: as it is written.
        against: the other router.
        against_library: of the other one; None for the base, which belongs to none.
        split: `held_in`, `held_out` or `mixed`.
    """

    library: str
    router: str
    against: str
    against_library: str | None
    split: str


@dataclass(frozen=True, kw_only=True)
class OracleGap(GapClosed):
    """How much of what the oracle gains over the base a router gains.

    Args:
        library: of the router and the oracle.
        router: as it is written.
        split: `held_in`, `held_out` or `mixed`.
    """

    library: str
    router: str
    split: str


class CellSummary:
    """Everything that is computed from cells.

    Args:
        cells: of one or more libraries over one base.
        failures: cells that could not be scored.
    """

    def __init__(self, cells: Sequence[Cell], failures: Sequence[CellFailure] = ()) -> None:
        self._cells = cells
        self.columns = columns_of(cells)
        self._primary = primary_cells(cells)
        self._splits = grouped_tasks(cells)
        split_of = {task: split for split, tasks in self._splits.items() for task in tasks}
        self._left_out: dict[str, list[Column]] = {}
        # A task that nobody was scored on has no split, and is named all the same.
        for split in (*self._splits, None):
            scored = [key for key in self._primary if split in (None, split_of[key[1]])]
            failed = [(column_of(f), f.task) for f in failures if split_of.get(f.task) == split]
            self._left_out |= failed_tasks(scored, failed)
        self._scores = _columns(self._primary)
        self._template_scores = self._by_template(self._primary)

    def means(self) -> list[Mean]:
        """The mean of every router on each split; the base once for each library, and in each of its two templates."""
        return list(self._means({**self._primary, **self._template_scores}, by_family=False))

    def family_means(self) -> list[Mean]:
        """The same over the tasks of each family of a split."""
        return list(self._means({**self._primary, **self._template_scores}, by_family=True))

    def loss_means(self) -> list[Mean]:
        """The same of losses in nats, those of the base in the template that counts."""
        losses: dict[tuple[Column, str], Cell] = {}
        for cell in self._cells:
            key = (column_of(cell), cell.task)
            counts = self._primary.get(key)
            if cell.metric == "loss" and counts and cell.template == counts.template:
                losses.setdefault(key, cell)
        return list(self._means({**losses, **self._by_template(losses)}, by_family=False))

    def _by_template(self, counting: Mapping[tuple[Column, str], Cell]) -> dict[tuple[Column, str], Cell]:
        """The base's cells of the kind that counts, by template throughout; none where it has one template alone."""
        cells: dict[tuple[Column, str], Cell] = {}
        for cell in self._cells:
            counts = counting.get((column_of(cell), cell.task))
            if cell.router == BASE and counts is not None and cell.metric == counts.metric:
                cells.setdefault((Column(None, base_in(cell.template)), cell.task), cell)
        return cells if len({column for column, _ in cells}) > 1 else {}

    def comparisons(self) -> list[Comparison]:
        """Every two routers of one library, the base among them, and the same router in every two libraries."""
        return [
            self._compared(column, other, split, tasks)
            for i, column in enumerate(self.columns)
            for other in self.columns[:i]
            if other.library in (None, column.library) or other.router == column.router
            for split in self._splits
            if (tasks := self._paired(split, column, other))
        ]

    def oracle_gaps(self) -> list[OracleGap]:
        """For each router that is neither base nor oracle, how far it comes, on each split."""
        gaps = []
        for column in self.columns:
            base, oracle = Column(None, BASE), Column(column.library, ORACLE)
            if column.library is None or column == oracle:
                continue
            for split in self._splits:
                if tasks := self._paired(split, column, oracle, base):
                    closed = self._scores.gap_closed(column, oracle, base, tasks)
                    gaps.append(OracleGap(library=column.library, router=column.router, split=split, **vars(closed)))
        return gaps

    def base_guard(self) -> list[dict[str, Any]]:
        """Every task on which the base alone beats a router, by name, with the verdict of the router there."""
        guard = []
        for (column, task), cell in self._primary.items():
            base = self._primary.get((Column(None, BASE), task))
            if column.router != BASE and base is not None and base.value > cell.value:
                alike = _is_same_question(cell, base) and cell.values and base.values
                compared = self._scores.difference(column, Column(None, BASE), [task]) if alike else None
                guard.append({
                    "library": cell.library, "task": task, "router": cell.router, "split": cell.split,
                    "metric": cell.metric, "base": base.value, "value": cell.value,
                    "verdict": compared and compared.verdict, "p_rows": compared and compared.p_rows,
                })  # fmt: skip
        return guard

    def left_out(self) -> list[dict[str, Any]]:
        """Tasks that are in no mean, comparison or gap since a compared router failed on them, and these routers."""
        return [
            {"task": task, "library": column.library, "router": column.router}
            for task, columns in self._left_out.items()
            for column in columns
        ]

    def _means(self, cells: dict[tuple[Column, str], Cell], *, by_family: bool) -> Iterator[Mean]:
        columns = _columns(cells)
        ordered = sorted(dict.fromkeys(column for column, _ in cells), key=self._position)
        for library in libraries_of(self._cells):
            for column in ordered:
                if column.library not in (None, library):
                    continue
                for split, tasks in self._splits.items():
                    groups: dict[str | None, list[str]] = {}
                    for task in tasks:
                        if (cell := cells.get((column, task))) and task not in self._left_out:
                            groups.setdefault(cell.family if by_family else None, []).append(task)
                    for family, group_tasks in groups.items():
                        mean = vars(columns.mean(column, group_tasks))
                        yield Mean(library=library, router=column.router, split=split, family=family, **mean)

    def _position(self, column: Column) -> tuple[bool, int]:
        """The base first, then in each template, then the routers in the order in which they come."""
        return not is_base(column.router), self.columns.index(column) if column in self.columns else len(self.columns)

    def _paired(self, split: str, *columns: Column) -> list[str]:
        """Tasks of a split that all were scored on, over the same rows and by the same metric."""
        tasks = []
        for task in self._splits[split]:
            cells = [self._primary.get((column, task)) for column in columns]
            if task not in self._left_out and all(cell and _is_same_question(cell, cells[0]) for cell in cells):
                tasks.append(task)
        return tasks

    def _compared(self, column: Column, other: Column, split: str, tasks: Sequence[str]) -> Comparison:
        assert column.library is not None
        return Comparison(
            library=column.library,
            router=column.router,
            against=other.router,
            against_library=other.library,
            split=split,
            **vars(self._scores.difference(column, other, tasks)),
        )


def _columns(cells: dict[tuple[Column, str], Cell]) -> Columns[Column]:
    values: dict[Column, dict[str, list[float]]] = {}
    for (column, task), cell in cells.items():
        values.setdefault(column, {})[task] = cell.values
    return Columns(values)


def _is_same_question(cell: Cell, other: Cell | None) -> bool:
    return other is not None and (cell.metric, cell.n, cell.data) == (other.metric, other.n, other.data)
