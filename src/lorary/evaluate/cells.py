"""Cells of an evaluation: one router of one library on one task, or why there is none."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

BASE, ORACLE = "base", "oracle"
# Fields of a cell that hold something for each row.
OF_ROWS = ("values", "answers")
SPLITS = ("held_in", "held_out")
# A task that is held in for one of two libraries and held out for the other.
MIXED = "mixed"


@dataclass(frozen=True)
class Cell:
    """One router on one task under one metric.

    Args:
        library: name of the library.
        router: the router as it is written (see `lorary.route.spec`).
        task: name of the task.
        family: its family.
        split: `held_in` if an expert was trained on it, else `held_out`.
        metric: what `value` is.
        primary: whether this is the one cell of (library, router, task) that counts; its value is in 0..1.
        value: mean over rows.
        low: lower end of the 95 % bootstrap interval over rows.
        high: its upper end.
        n: number of rows.
        seconds: time that scoring these rows took (all metrics of the router and task together).
        template: prompt template.
        expert: the expert that a reference used, such as the oracle; `base` where it took the base.
        peak_bytes: most memory that the process held meanwhile, base model and library included: on CUDA what torch
            had allocated there, else the resident set. None where it was not measured.
        data: hash of the task's data.
        prefix: text with which every prompt began, as the chat template wrote it; "" for plain.
        values: one per row, for paired comparisons.
        base_rows: rows that the router handed to the base in its own chat template, since no expert fitted.
        answers: one per row of the cell under the task's own metric; empty elsewhere, and where it was scored before
            answers were kept.
    """

    library: str
    router: str
    task: str
    family: str
    split: str
    metric: str
    primary: bool
    value: float
    low: float
    high: float
    n: int
    seconds: float
    template: str
    expert: str | None = None
    peak_bytes: int | None = None
    data: str = ""
    prefix: str = ""
    values: list[float] = field(default_factory=list)
    base_rows: int = 0
    answers: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class CellFailure:
    """A cell that could not be scored, and why; it is tried again by the next run.

    Args:
        library: name of the library.
        router: the router as it is written.
        task: name of the task.
        rule: what must hold.
        found: the value that did not.
        remedy: what to do about it.
    """

    library: str
    router: str
    task: str
    rule: str
    found: str | None = None
    remedy: str | None = None


def base_in(template: str) -> str:
    """What the base is called where it is in one template throughout, whichever counts."""
    return f"{BASE} ({template})"


def is_base(router: str) -> bool:
    """Whether a column is the base's, in the template that counts or in one throughout."""
    return router == BASE or router.startswith(f"{BASE} (")


class Column(NamedTuple):
    """Who is scored: a router of a library. The base belongs to none, so that it counts once however many there are."""

    library: str | None
    router: str

    def label(self, *, with_library: bool) -> str:
        """What to call it.

        Args:
            with_library: whether libraries must be told apart.
        """
        return f"{self.library}: {self.router}" if with_library and self.library is not None else self.router


def column_of(cell: Cell | CellFailure) -> Column:
    """Whom a cell scores, or could not score."""
    return Column(None if cell.router == BASE else cell.library, cell.router)


def columns_of(cells: Iterable[Cell]) -> list[Column]:
    """Whom the cells score: the base first, the others in the order in which they come."""
    columns = dict.fromkeys(map(column_of, cells))
    return sorted(columns, key=lambda column: column.router != BASE)


def primary_cells(cells: Iterable[Cell]) -> dict[tuple[Column, str], Cell]:
    """The cells that count, by column and task; of the base on a task the first."""
    primary: dict[tuple[Column, str], Cell] = {}
    for cell in cells:
        if cell.primary:
            primary.setdefault((column_of(cell), cell.task), cell)
    return primary


def libraries_of(cells: Sequence[Cell]) -> list[str]:
    """Names of the libraries, in the order in which they come."""
    return list(dict.fromkeys(cell.library for cell in cells))


def grouped_tasks(cells: Iterable[Cell]) -> dict[str, list[str]]:
    """Tasks by split, in the order in which they come; `MIXED` for those that libraries do not agree about."""
    splits: dict[str, set[str]] = {}
    for cell in cells:
        if cell.primary:
            splits.setdefault(cell.task, set()).add(cell.split)
    groups: dict[str, list[str]] = {split: [] for split in (*SPLITS, MIXED)}
    for task, task_splits in splits.items():
        groups[next(iter(task_splits)) if len(task_splits) == 1 else MIXED].append(task)
    return {split: tasks for split, tasks in groups.items() if tasks}
