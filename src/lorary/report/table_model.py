"""The cells of an evaluation, arranged for reading: tasks in order, one cell per router and task, means of splits."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lorary.evaluate.cells import is_base
from lorary.evaluate.compare import Verdict, verdict_of
from lorary.evaluate.metrics import REPORTED
from lorary.route.spec import ORACLE, ORACLE_OR_BASE, RANDOM

BASE = "base"
# Told the task, so no competitors of the routers that are not.
TOLD = (ORACLE, ORACLE_OR_BASE, RANDOM)
MIXED = "mixed"
SPLITS = {"held_in": "held-in", "held_out": "held-out", MIXED: "mixed"}

Cell = Mapping[str, Any]


class TaskLine(NamedTuple):
    """A row of the table."""

    split: str
    family: str
    name: str
    metric: str
    rows: int


class TableMean(NamedTuple):
    """A mean over tasks with its 95 % interval over rows, and that over tasks where there is one."""

    value: float
    low: float
    high: float
    tasks: int
    tasks_low: float | None = None
    tasks_high: float | None = None
    p_rows: float = 0.0
    p_tasks: float = 0.0

    @property
    def verdict(self) -> Verdict:
        """Of a difference, over rows."""
        return verdict_of(self.low, self.high)

    @property
    def is_wider(self) -> bool:
        """Of a difference: whether the verdict holds over tasks too."""
        if self.tasks_low is None or self.tasks_high is None:
            return False
        return verdict_of(self.tasks_low, self.tasks_high) == self.verdict != "level"


def is_told(router: str) -> bool:
    """Whether a column is an oracle's or its control's, which are told what no router knows."""
    return any(router == name or router.endswith(f": {name}") for name in TOLD)


class ScoreTable:
    """An evaluation, arranged.

    Args:
        evaluation: the document of `lorary evaluate --json`.
    """

    def __init__(self, evaluation: Mapping[str, Any]) -> None:
        self.libraries = list(dict.fromkeys(cell["library"] for cell in evaluation["cells"]))
        several = len(self.libraries) > 1

        def called(row: Mapping[str, Any], library: str = "library", router: str = "router") -> str:
            """With several libraries a column is called by both, except the base, which is in all of them."""
            name = str(row[router])
            return f"{row[library]}: {name}" if several and not is_base(name) else name

        def renamed(key: str) -> list[dict[str, Any]]:
            return [{**entry, "router": called(entry)} for entry in evaluation.get(key, [])]

        # Library and router, as it is written, of each column.
        self.origin = {called(c): (str(c["library"]), str(c["router"])) for c in evaluation["cells"]}
        # The base is in every library and counts once.
        cells = _once({**c, "router": called(c)} for c in _as_floats(evaluation["cells"], "value", "low", "high"))
        cells = _in_common_splits(cells, evaluation["cells"])
        self.primary = {(c["router"], c["task"]): c for c in cells if c["primary"]}
        templates = {(*key, c["template"]) for key, c in self.primary.items()}
        losses = [c for c in cells if c["metric"] == "loss" and (c["router"], c["task"], c["template"]) in templates]
        self.losses = {(c["router"], c["task"]): c for c in losses}
        self.secondary = {
            (c["router"], c["task"]): c for c in cells if not c["primary"] and c["metric"] not in REPORTED
        }
        self.routers = list(dict.fromkeys(c["router"] for c in cells))
        lines = {TaskLine(c["split"], c["family"], c["task"], c["metric"], c["n"]) for c in self.primary.values()}
        self.tasks = sorted(lines)
        self.splits = [split for split in SPLITS if any(line.split == split for line in lines)]
        self._comparisons = [
            {**c, "router": called(c), "against": called(c, "against_library", "against")}
            for c in _as_floats(evaluation.get("comparisons", []), "difference", "low", "high")
        ]
        guard = _as_floats(evaluation.get("base_guard", []), "base", "value")
        self.guard = [{**entry, "router": called(entry)} for entry in guard]
        self.gaps = renamed("oracle_gaps")
        self.routing = renamed("routing")
        self.routing_means = renamed("routing_means")
        self.routing_usage = renamed("routing_usage")
        self.expert_losses = evaluation.get("expert_losses", [])
        self.base_templates = evaluation.get("base_templates", [])
        self.rows: Mapping[str, Any] = evaluation.get("rows", {})
        self.failures = renamed("failures")
        self.left_out = renamed("left_out")
        self.means = evaluation.get("means", [])
        means = [*self.means, *evaluation.get("family_means", [])]
        self._means = {(called(m), m["split"], m.get("family")): _mean_of(m) for m in means}
        self._loss_means = {(called(m), m["split"]): _mean_of(m) for m in evaluation.get("loss_means", [])}
        self.settings: Mapping[str, Mapping[str, Any]] = evaluation.get("routers", {})

    @property
    def main(self) -> str | None:
        """The router that the page is about: the best one of the first split."""
        routers = [router for router in self.routers if router != BASE and not is_told(router)]
        best = (self.best(split) for split in self.splits)
        return next(filter(None, best), next(iter(routers), None))

    def best(self, split: str) -> str | None:
        """The router with the highest mean on a split, of those that are neither the base nor told the task."""
        means = {router: mean for router in self.routers if (mean := self.mean(router, split))}
        routers = [router for router in means if router != BASE and not is_told(router)]
        return max(routers, key=lambda router: means[router].value, default=None)

    def lines(self, split: str) -> list[TaskLine]:
        """Tasks of a split, by family and name."""
        return [line for line in self.tasks if line.split == split]

    def mean(self, router: str, split: str, family: str | None = None) -> TableMean | None:
        """Mean primary value of a router over the tasks of a split, or of one family of it; None without tasks."""
        return self._means.get((router, split, family))

    def mean_loss(self, router: str, split: str) -> TableMean | None:
        """Mean loss of a router over the tasks of a split; None without losses."""
        return self._loss_means.get((router, split))

    def difference(self, router: str, against: str, split: str) -> TableMean | None:
        """Paired difference of two routers on a split, whichever way round the evaluation has it."""
        for entry in self._comparisons:
            if entry["split"] != split:
                continue
            d, low, high, tasks = entry["difference"], entry["low"], entry["high"], entry["tasks"]
            wide_low, wide_high = entry.get("tasks_low"), entry.get("tasks_high")
            ps = entry.get("p_rows", 0.0), entry.get("p_tasks", 0.0)
            if (entry["router"], entry["against"]) == (router, against):
                return TableMean(d, low, high, tasks, wide_low, wide_high, *ps)
            if (entry["router"], entry["against"]) == (against, router):
                flipped = [None if end is None else -end for end in (wide_high, wide_low)]
                return TableMean(-d, -high, -low, tasks, flipped[0], flipped[1], *ps)
        return None


def _mean_of(row: Mapping[str, Any]) -> TableMean:
    """A mean of the document."""
    return TableMean(float(row["mean"]), float(row["low"]), float(row["high"]), *(row[key] for key in
                ("tasks", "tasks_low", "tasks_high")))  # fmt: skip


def _once(cells: Iterable[Cell]) -> list[Cell]:
    """The cells, of equal columns and questions the first."""
    first: dict[tuple[Any, ...], Cell] = {}
    for cell in cells:
        first.setdefault(tuple(cell[key] for key in ("router", "task", "metric", "template")), cell)
    return list(first.values())


def _in_common_splits(cells: Iterable[Cell], all_cells: Iterable[Cell]) -> list[Cell]:
    """The cells; where libraries disagree on the split of a task, it is mixed for all of them."""
    splits: dict[str, set[str]] = {}
    for cell in all_cells:
        splits.setdefault(cell["task"], set()).add(cell["split"])
    return [{**c, "split": c["split"] if len(splits[c["task"]]) == 1 else MIXED} for c in cells]


def _as_floats(entries: Iterable[Cell], *keys: str) -> list[Cell]:
    """The entries, with these numbers as floats: a document that went through JSON may hold 1 for 1.0."""
    return [{**entry, **{key: float(entry[key]) for key in keys}} for entry in entries]
