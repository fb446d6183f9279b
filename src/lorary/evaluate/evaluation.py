"""An evaluation: its cells and all that follows from them, of one library or several."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from lorary.data.schema import Row
from lorary.errors import LoraryError, TaskError, UsageError
from lorary.evaluate.base_template import BaseTemplate, choose_templates, count_templates
from lorary.evaluate.cells import Cell, CellFailure, Column, columns_of, grouped_tasks, is_base, primary_cells
from lorary.evaluate.routing_accuracy import RoutingAccuracy, RoutingMean, RoutingUsage, routing_means
from lorary.evaluate.settings import EvaluateSettings
from lorary.evaluate.summary import CellSummary, Comparison, Mean, OracleGap
from lorary.route.spec import REFERENCES
from lorary.tabular import ResultTable, Tabular


@dataclass(frozen=True)
class ExpertLosses:
    """What each expert does alone on a task that has no expert of its own: by this the oracle chooses.

    Args:
        library: name of the library.
        task: name of the task.
        split: whose rows were looked at.
        rows: how many.
        losses: mean loss of each expert, in nats per target token.
    """

    library: str
    task: str
    split: str
    rows: int
    losses: dict[str, float]


@dataclass(frozen=True, repr=False)
class Evaluation(Tabular):
    """All cells and what follows from them. Made by `evaluation_of`.

    Args:
        cells: in the order of libraries, tasks and routers; the base stands with every library.
        failures: cells that could not be scored.
        routing: for held-in tasks, how much of the routing goes to the expert of the task.
        routing_usage: for all tasks, how much of the routing goes to each expert.
        expert_losses: for held-out tasks, what each expert does alone.
        base_templates: in which template the base counts on each task, where it was scored in two.
        rows: the test rows that were scored, by task.
        comparisons: paired differences; the base counts once.
        means: of every router on every split.
        family_means: of every router on every family of a split.
        loss_means: of every router's losses on every split.
        oracle_gaps: how far routers come from the base to the oracle.
        routing_means: of `routing` over tasks, and over those of each family.
        base_guard: tasks on which the base beats a router.
        left_out: tasks that are in no mean, comparison or gap, since a router that has scores failed on them.
        settings: how it was done.
        libraries: their names.
        base: name of the base model.
        tasks_by_name: by library, the adapters of which no task is recorded and whose names are tasks.
    """

    cells: list[Cell]
    failures: list[CellFailure]
    routing: list[RoutingAccuracy]
    routing_usage: list[RoutingUsage]
    expert_losses: list[ExpertLosses]
    base_templates: list[BaseTemplate]
    rows: Mapping[str, Sequence[Row]]
    comparisons: list[Comparison]
    means: list[Mean]
    family_means: list[Mean]
    loss_means: list[Mean]
    oracle_gaps: list[OracleGap]
    routing_means: list[RoutingMean]
    base_guard: list[dict[str, Any]]
    left_out: list[dict[str, Any]]
    settings: EvaluateSettings
    libraries: tuple[str, ...]
    base: str
    tasks_by_name: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def library(self) -> str:
        """The library's name, or those of all."""
        return " + ".join(self.libraries)

    def tables(self) -> list[ResultTable]:
        """The means of every router, and the tasks of each split with a column for each router."""
        columns, primary, several = columns_of(self.cells), primary_cells(self.cells), len(self.libraries) > 1
        failed = f"; {len(self.failures)} cells failed" if self.failures else ""
        title = f"{self.library} over {self.base}: means with 95 % intervals over rows{failed}"
        means = [
            (Column(None if is_base(m.router) else m.library, m.router).label(with_library=several), m.split, m.mean,
             m.low, m.high, m.tasks)
            for m in self.means
        ]  # fmt: skip
        heads = ("router", "split", "mean", "low", "high", "tasks")
        tables = [ResultTable(title, heads, list(dict.fromkeys(means)))]
        for split, tasks in grouped_tasks(self.cells).items():
            lines = []
            for task in tasks:
                cells = [primary.get((column, task)) for column in columns]
                first = next(cell for cell in cells if cell is not None)
                lines.append([task, first.metric, first.n, *(cell and cell.value for cell in cells)])
            labels = (column.label(with_library=several) for column in columns)
            tables.append(ResultTable(f"{split.replace('_', '-')} tasks", ("task", "metric", "rows", *labels), lines))
        return tables

    def records(self) -> list[dict[str, Any]]:
        """One mapping for each cell, as in the CSV file: without the values of single rows."""
        names = [each.name for each in fields(Cell)]
        return [
            {name: value for name in names if not isinstance(value := getattr(cell, name), list)}
            for cell in self.cells
        ]  # fmt: skip

    def check(self) -> None:
        """Refuse to pass for a whole evaluation where cells failed.

        Raises:
            LoraryError: with the number of them and the first one's reason.
        """
        if not self.failures:
            return
        first, scored = self.failures[0], sum(cell.primary for cell in self.cells)
        raise LoraryError(
            f"{len(self.failures)} of {scored + len(self.failures)} cells could not be scored, the first of them "
            f"{first.library}, {first.router}, {first.task}: {first.rule}",
            found=first.found,
            remedy=first.remedy,
        )

    def mean(self, router: str, split: str, library: str | None = None) -> float | None:
        """Mean primary value of a router over the tasks of a split, or None where it has none.

        Args:
            router: as it is written.
            split: `held_in`, `held_out`, or `mixed` where libraries differ.
            library: whose; the first where None.
        """
        name = library or self.libraries[0]
        return next((m.mean for m in self.means if (m.library, m.router, m.split) == (name, router, split)), None)

    def left_out_pairs(self) -> list[tuple[str, str]]:
        """Task and router, as it is called, of each failure that takes a task out of all figures."""
        with_library = len(self.libraries) > 1
        return [(e["task"], Column(e["library"], e["router"]).label(with_library=with_library)) for e in self.left_out]

    def to_json(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        settings = {r: self.settings.setting(r).to_json() for r in self.settings.routers if r not in REFERENCES}
        return {
            "library": self.library,
            "libraries": list(self.libraries),
            "base": self.base,
            "settings": asdict(self.settings),
            "routers": settings,
            "cells": [asdict(cell) for cell in self.cells],
            "failures": [asdict(failure) for failure in self.failures],
            "means": [asdict(mean) for mean in self.means],
            "family_means": [asdict(mean) for mean in self.family_means],
            "loss_means": [asdict(mean) for mean in self.loss_means],
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
            "oracle_gaps": [asdict(gap) for gap in self.oracle_gaps],
            "routing": [asdict(routing) for routing in self.routing],
            "routing_usage": [asdict(usage) for usage in self.routing_usage],
            "expert_losses": [asdict(losses) for losses in self.expert_losses],
            "base_templates": [asdict(choice) for choice in self.base_templates],
            "rows": {
                task: [{"prompt": row.source, "references": list(row.references)} for row in rows]
                for task, rows in self.rows.items()
            },
            "routing_means": [asdict(mean) for mean in self.routing_means],
            "base_guard": self.base_guard,
            "left_out": self.left_out,
            "tasks_by_name": {name: list(adapters) for name, adapters in self.tasks_by_name.items()},
        }


@dataclass
class ScoredCells:
    """What was scored so far, as an `Evaluation` has it."""

    cells: list[Cell] = field(default_factory=list)
    failures: list[CellFailure] = field(default_factory=list)
    routing: list[RoutingAccuracy] = field(default_factory=list)
    tasks_by_name: dict[str, list[str]] = field(default_factory=dict)
    routing_usage: list[RoutingUsage] = field(default_factory=list)
    expert_losses: list[ExpertLosses] = field(default_factory=list)
    base_templates: list[BaseTemplate] = field(default_factory=list)
    rows: dict[str, Sequence[Row]] = field(default_factory=dict)


def evaluation_of(scored: ScoredCells, settings: EvaluateSettings, libraries: Sequence[str], base: str) -> Evaluation:
    """Everything that follows from what was scored."""
    choices = choose_templates(scored.base_templates)
    cells = count_templates(scored.cells, choices)
    summary = CellSummary(cells, scored.failures)
    return Evaluation(
        cells,
        scored.failures,
        scored.routing,
        scored.routing_usage,
        scored.expert_losses,
        choices,
        scored.rows,
        summary.comparisons(),
        summary.means(),
        summary.family_means(),
        summary.loss_means(),
        summary.oracle_gaps(),
        routing_means(scored.routing),
        summary.base_guard(),
        summary.left_out(),
        settings,
        tuple(libraries),
        base,
        scored.tasks_by_name,
    )


def combine(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Several evaluations over one base as one: their cells together, all that follows computed anew.

    Routers are compared across libraries too, on tasks that coincide. Where two evaluations hold the same cell of a
    library, the first one's stays.

    Args:
        evaluations: at least one; of other libraries, tasks or routers, else asked for alike.

    Returns:
        The whole.

    Raises:
        UsageError: if there is none, they differ in the base or in a setting beside the routers, or disagree on a cell.
        TaskError: if a task of one name has other data in another evaluation.
    """
    if not evaluations:
        raise UsageError("there must be an evaluation to combine", found="none")
    first = evaluations[0]
    for other in evaluations[1:]:
        _check_alike(first, other)
    _check_same_data([cell for part in evaluations for cell in part.cells])
    scored = ScoredCells()
    for part in evaluations:
        _check_same_cells(scored.cells, part.cells)
        _add(scored.cells, part.cells, "library", "router", "task", "metric", "template")
        _add(scored.failures, part.failures, "library", "router", "task")
        _add(scored.routing, part.routing, "library", "router", "task")
        for name, adapters in part.tasks_by_name.items():
            scored.tasks_by_name[name] = sorted({*scored.tasks_by_name.get(name, ()), *adapters})
        _add(scored.routing_usage, part.routing_usage, "library", "router", "task")
        _add(scored.expert_losses, part.expert_losses, "library", "task")
        _add(scored.base_templates, part.base_templates, "task")
        scored.rows = {**part.rows, **scored.rows}
    has_score = {(cell.library, cell.router, cell.task) for cell in scored.cells}
    scored.failures = [f for f in scored.failures if (f.library, f.router, f.task) not in has_score]
    routers = dict.fromkeys(router for part in evaluations for router in part.settings.routers)
    libraries = dict.fromkeys(name for part in evaluations for name in part.libraries)
    return evaluation_of(scored, replace(first.settings, routers=tuple(routers)), list(libraries), first.base)


def _add(entries: list[Any], added: Sequence[Any], *keys: str) -> None:
    entry_keys = {tuple(getattr(entry, key) for key in keys) for entry in entries}
    entries += [entry for entry in added if tuple(getattr(entry, key) for key in keys) not in entry_keys]


def _check_same_data(cells: Sequence[Cell]) -> None:
    """Refuse tasks that share a name alone: the base, which counts once, would be that of the first of them."""
    first_of: dict[str, Cell] = {}
    for cell in cells:
        first = first_of.setdefault(cell.task, cell)
        if cell.data != first.data:
            raise TaskError(
                f"evaluations must have the same data of task '{cell.task}' to be combined",
                found=f"other data with library '{first.library}' than with library '{cell.library}'",
                remedy="evaluate both on the same data, or give one of the two tasks another name",
            )


def _check_same_cells(cells: Sequence[Cell], added: Sequence[Cell]) -> None:
    """Refuse two libraries of one name, of which one would be lost."""
    values = {(c.library, c.router, c.task, c.metric, c.template): (c.value, c.n, c.data) for c in cells}
    for c in added:
        before = values.get((c.library, c.router, c.task, c.metric, c.template))
        if before is not None and before != (c.value, c.n, c.data):
            raise UsageError(
                f"evaluations must agree on a cell that both hold: {c.library}, {c.router}, {c.task}, {c.metric}",
                found=f"{before[0]:g} and {c.value:g}",
                remedy="evaluate libraries in folders of one name in one run, which tells them apart",
            )


def _check_alike(first: Evaluation, other: Evaluation) -> None:
    settings: list[Mapping[str, Any]] = [{**asdict(e.settings), "base": e.base} for e in (first, other)]
    different = [key for key in settings[0] if key != "routers" and settings[0][key] != settings[1][key]]
    if different:
        key = different[0]
        raise UsageError(
            f"evaluations must share their {key} to be combined",
            found=f"{settings[0][key]!r} and {settings[1][key]!r}",
            remedy="evaluate both alike",
        )
