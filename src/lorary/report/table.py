"""The table of tasks and routers, once with the tasks' own metrics and once with losses."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from lorary.evaluate.metrics import METRIC_MEANINGS, METRIC_NAMES
from lorary.report.markup import counted, hundredths, template_words
from lorary.report.shell import part
from lorary.report.table_model import BASE, SPLITS, Cell, ScoreTable, TaskLine, is_told

SPLIT_NOTES = {
    "held_in": "an expert is recorded as trained on each of them",
    "held_out": "no expert is recorded as trained on them",
    "mixed": "held in for one library and held out for another",
}
# A longer table scrolls under its heading.
NUM_PLAIN_ROWS = 40
# A difference to the base that is shaded in full: half of the scale, or half of the base's own loss.
FULL_SHADE = 0.5


def table_section(table: ScoreTable, colours: Mapping[str, int]) -> Markup:
    """The tables with their notes.

    Args:
        table: the evaluation.
        colours: number of each family's colour.
    """
    tables = [score_table(table, colours, losses=losses) for losses in (False, True)[: 1 + bool(table.losses)]]
    metrics = sorted({line.metric for line in table.tasks if line.metric in METRIC_MEANINGS})
    meanings = {METRIC_NAMES[metric]: METRIC_MEANINGS[metric] for metric in metrics}
    has_oracle = any(is_told(router) for router in table.routers)
    return part("evaluation.html", "table", tables, has_oracle, meanings, len(table.tasks) > NUM_PLAIN_ROWS,
                template_words(table.base_templates, table.means))  # fmt: skip


def score_table(table: ScoreTable, colours: Mapping[str, int], *, losses: bool) -> Markup:
    """Tasks by split and family, one column per router.

    Args:
        table: the evaluation.
        colours: number of each family's colour.
        losses: show losses in nats instead of primary values.

    Returns:
        An HTML table.
    """
    routers = [{"name": router, "is_told": is_told(router)} for router in table.routers]
    splits = [_split(table, split, losses) for split in table.splits]
    return part("evaluation.html", "scores", "losses" if losses else "scores", routers, splits, colours)


def _split(table: ScoreTable, split: str, losses: bool) -> dict[str, Any]:
    lines = table.lines(split)
    means = [(table.mean_loss if losses else table.mean)(router, split) for router in table.routers]
    return {
        "name": SPLITS[split],
        "note": SPLIT_NOTES[split],
        "lines": [{"task": line, "cells": _cells(table, line, losses)} for line in lines],
        "metrics": METRIC_NAMES,
        "means": [mean and _shown(mean._asdict(), losses) for mean in means],
        # Where a router failed, the mean of each is over fewer tasks than stand above it.
        "counts": sorted({mean.tasks for mean in means if mean} - {len(lines)}),
    }


def _cells(table: ScoreTable, line: TaskLine, losses: bool) -> list[dict[str, Any] | None]:
    source = table.losses if losses else table.primary
    cells = {router: source[router, line.name] for router in table.routers if (router, line.name) in source}
    rivals = {cell["value"] for router, cell in cells.items() if not is_told(router)}
    # Where all score alike, nothing is best.
    best = (min(rivals) if losses else max(rivals)) if len(rivals) > 1 else None
    return [_cell(table, cells, router, best, losses) for router in table.routers]


def _cell(
    table: ScoreTable, cells: Mapping[str, Cell], router: str, best: float | None, losses: bool
) -> dict[str, Any] | None:
    cell = cells.get(router)
    if cell is None:
        return None
    classes = ["apart"] if is_told(router) else []
    if not is_told(router) and cell["value"] == best:
        classes.append("best")
    gain = _gain(cells.get(BASE), cell, losses) if router != BASE else 0.0
    if abs(gain) >= 0.005:
        classes.append("up" if gain > 0 else "down")
    value, low, high = _shown(cell, losses)
    return {
        "classes": " ".join(classes),
        "shade": f"{min(1.0, abs(gain) / FULL_SHADE):.2f}" if gain else "",
        "title": _tooltip(table, cell, losses),
        "template": cell["template"] if router == BASE else "",
        "value": value,
        "low": low,
        "high": high,
    }


def _gain(base: Cell | None, cell: Cell, losses: bool) -> float:
    """What a cell gains over the base: points of 1, or for losses the share of the base's loss that is gone."""
    if base is None:
        return 0.0
    return (base["value"] - cell["value"]) / max(base["value"], 1e-6) if losses else cell["value"] - base["value"]


def _tooltip(table: ScoreTable, cell: Cell, losses: bool) -> str:
    parts = [f"{cell['router']} on {cell['task']}", f"{cell['template']} template", counted(cell["n"], "row")]
    secondary = table.secondary.get((cell["router"], cell["task"]))
    if secondary and not losses:
        parts.append(f"{secondary['template']} template: {hundredths(secondary['value'])}")
    if cell.get("expert"):
        parts.append(f"expert {cell['expert']}")
    return ", ".join(parts)


def _shown(row: Mapping[str, Any], losses: bool) -> tuple[str, str, str]:
    """A value and the ends of its interval."""
    if losses:
        return f"{row['value']:.2f}", f"{row['low']:.2f}", f"{row['high']:.2f}"
    return hundredths(row["value"]), hundredths(row["low"], 0), hundredths(row["high"], 0)
