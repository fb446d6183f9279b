"""Experts by tasks: how much of the routing each expert gets, and how each does alone, as packed matrices."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lorary.report.plots import OTHER, packed
from lorary.report.table_model import SPLITS, ScoreTable
from lorary.route.spec import BEST_SINGLE, ORACLE

# A value is stored as a whole number of these parts; the largest number of two bytes stands for "not known".
PARTS = 1000
UNKNOWN = 65535


class View(NamedTuple):
    """A matrix: its library, what it is called, `share`, `score` or `loss`, and values by expert and task."""

    library: str
    name: str
    kind: str
    values: dict[tuple[str, str], float]


def expert_matrix(table: ScoreTable, families: Mapping[str, str]) -> dict[str, Any] | None:
    """The views of the matrix; None where no expert was looked at.

    Args:
        table: the evaluation.
        families: of experts, by name.

    Returns:
        `experts` and `tasks` in the order of their families; `views`, each with `name`, `kind` (`share` of the routing
        weight, `score` or `loss` alone) and the packed values, experts by tasks; `marks`, the positions of expert and
        task where an expert was trained on the task.
    """
    views = [*_shares(table), *_scores(table), *_losses(table)]
    if not views:
        return None
    names = {name for view in views for name, _ in view.values}
    experts = sorted(names, key=lambda name: (families.get(name, OTHER), name))
    lines = [line for split in table.splits for line in table.lines(split)]
    rows, columns = {name: i for i, name in enumerate(experts)}, {line.name: i for i, line in enumerate(lines)}
    own = {(entry["expert"], entry["task"]) for entry in table.routing}
    return {
        "experts": [{"name": name, "family": families.get(name, OTHER)} for name in experts],
        "tasks": [{"name": line.name, "family": line.family, "split": SPLITS[line.split]} for line in lines],
        "parts": PARTS,
        "views": [{"name": v.name, "kind": v.kind, "values": _packed(v, rows, columns)} for v in views],
        "marks": sorted([rows[expert], columns[task]] for expert, task in own if expert in rows and task in columns),
    }


def _shares(table: ScoreTable) -> Iterator[View]:
    """Mean shares of the routing weight, router by router."""
    for library, router in dict.fromkeys((entry["library"], entry["router"]) for entry in table.routing_usage):
        of_library = [entry for entry in table.routing_usage if entry["library"] == library]
        # An expert that an entry does not list has no weight there.
        names = {name for entry in of_library for name in entry["usage"]}
        entries = [entry for entry in of_library if entry["router"] == router]
        shares = {(name, entry["task"]): entry["usage"].get(name, 0.0) for entry in entries for name in names}
        if shares:
            yield View(library, router, "share", shares)


def _scores(table: ScoreTable) -> Iterator[View]:
    """Scores of the columns that are one expert: references beside experts that were scored by name."""
    views: dict[str, View] = {}
    for (router, task), cell in table.primary.items():
        library, name = table.origin[router]
        named: Sequence[str] = table.settings.get(name, {}).get("experts") or ()
        expert = cell.get("expert") if name in (ORACLE, BEST_SINGLE) else named[0] if len(named) == 1 else None
        if expert is not None:
            view = views.setdefault(library, View(library, _called(table, library), "score", {}))
            view.values[expert, task] = cell["value"]
    for view in views.values():
        # One expert for each task is a column of the table already.
        if len(view.values) > len({task for _, task in view.values}):
            yield view


def _losses(table: ScoreTable) -> Iterator[View]:
    """Losses by which oracles chose."""
    for library in dict.fromkeys(entry["library"] for entry in table.expert_losses):
        entries = [entry for entry in table.expert_losses if entry["library"] == library]
        losses = {(name, entry["task"]): loss for entry in entries for name, loss in entry["losses"].items()}
        yield View(library, _called(table, library), "loss", losses)


def _called(table: ScoreTable, library: str) -> str:
    return library if len(table.libraries) > 1 else ""


def _packed(view: View, rows: Mapping[str, int], columns: Mapping[str, int]) -> str:
    matrix = np.full((len(rows), len(columns)), UNKNOWN, dtype=np.int64)
    for (expert, task), value in view.values.items():
        if task in columns:
            matrix[rows[expert], columns[task]] = min(round(PARTS * value), UNKNOWN - 1)
    return packed(matrix, "<u2")
