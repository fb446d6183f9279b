"""The cells of an evaluation, arranged for reading: tasks in order, one cell per router and task, means of splits."""

from collections.abc import Iterable, Mapping
from math import sqrt
from typing import Any, NamedTuple

from lorary.evaluate.metrics import REPORTED

BASE = "base"
# Told the task, so no competitor of the routers that are not.
ORACLE = "oracle"
SPLITS = {"held_in": "held-in", "held_out": "held-out"}

Cell = Mapping[str, Any]


class TaskLine(NamedTuple):
    """A row of the table."""

    split: str
    family: str
    name: str
    metric: str
    rows: int


class Mean(NamedTuple):
    """A mean over tasks with its 95 % interval."""

    value: float
    low: float
    high: float
    tasks: int


class Board:
    """An evaluation, arranged.

    Args:
        evaluation: the document of `lorary evaluate --json`.
    """

    def __init__(self, evaluation: Mapping[str, Any]) -> None:
        cells = _as_floats(evaluation["cells"], "value", "low", "high")
        self.primary = {(c["router"], c["task"]): c for c in cells if c["primary"]}
        self.losses = _lowest(c for c in cells if c["metric"] == "loss")
        self.others = {(c["router"], c["task"]): c for c in cells if not c["primary"] and c["metric"] not in REPORTED}
        self.routers = list(dict.fromkeys(c["router"] for c in cells))
        lines = {TaskLine(c["split"], c["family"], c["task"], c["metric"], c["n"]) for c in self.primary.values()}
        self.tasks = sorted(lines)
        self.splits = [split for split in SPLITS if any(line.split == split for line in lines)]
        self._comparisons = _as_floats(evaluation.get("comparisons", []), "difference", "low", "high")
        self.guard = _as_floats(evaluation.get("base_guard", []), "base", "value")

    @property
    def main(self) -> str | None:
        """The router that the page is about: arrow, or else the first that is neither a baseline nor told the task."""
        rest = [router for router in self.routers if router not in (BASE, ORACLE)]
        return min(rest, key=lambda router: (router != "arrow", router == "uniform"), default=None)

    def lines(self, split: str) -> list[TaskLine]:
        """Tasks of a split, by family and name."""
        return [line for line in self.tasks if line.split == split]

    def mean(self, router: str, split: str, family: str | None = None) -> Mean | None:
        """Mean primary value of a router over the tasks of a split, or of one family of it; None without tasks."""
        lines = [line for line in self.lines(split) if family in (None, line.family)]
        return mean_of(self.primary[router, line.name] for line in lines if (router, line.name) in self.primary)

    def mean_loss(self, router: str, split: str) -> Mean | None:
        """Mean loss of a router over the tasks of a split; None without losses."""
        names = [line.name for line in self.lines(split)]
        return mean_of(self.losses[router, name] for name in names if (router, name) in self.losses)

    def difference(self, router: str, against: str, split: str) -> Mean | None:
        """Paired difference of two routers on a split, whichever way round the evaluation has it."""
        for entry in self._comparisons:
            if entry["split"] != split:
                continue
            d, low, high, tasks = entry["difference"], entry["low"], entry["high"], entry["tasks"]
            if (entry["router"], entry["against"]) == (router, against):
                return Mean(d, low, high, tasks)
            if (entry["router"], entry["against"]) == (against, router):
                return Mean(-d, -high, -low, tasks)
        return None


def mean_of(cells: Iterable[Cell]) -> Mean | None:
    """Mean over tasks; its interval follows from those of the cells, since rows of different tasks are independent."""
    found = list(cells)
    if not found:
        return None
    value = sum(cell["value"] for cell in found) / len(found)
    below = sqrt(sum((cell["value"] - cell["low"]) ** 2 for cell in found)) / len(found)
    above = sqrt(sum((cell["high"] - cell["value"]) ** 2 for cell in found)) / len(found)
    return Mean(value, value - below, value + above, len(found))


def _as_floats(rows: Iterable[Cell], *keys: str) -> list[Cell]:
    """The rows, with these numbers as floats: a document that went through JSON may hold 1 for 1.0."""
    return [{**row, **{key: float(row[key]) for key in keys}} for row in rows]


def _lowest(cells: Iterable[Cell]) -> dict[tuple[str, str], Cell]:
    """The cell of lowest value by router and task: the base is scored under two templates, the better one counts."""
    lowest: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        key = (cell["router"], cell["task"])
        if key not in lowest or cell["value"] < lowest[key]["value"]:
            lowest[key] = cell
    return lowest
