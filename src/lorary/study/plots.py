"""The numbers behind the pictures of a study's page: all columns at a glance, and pictures for each question."""

from collections.abc import Mapping, Sequence
from typing import Any

from lorary.evaluate.cells import BASE, ORACLE, is_base
from lorary.report.evidence_plots import FEWEST, heat_plot, rounded_points
from lorary.report.table_model import ScoreTable
from lorary.study.config import SPLITS, SUBSET, split_name

Document = Mapping[str, Any]
Row = Mapping[str, Any]
# What libraries may differ in, as an axis is called.
OF_LIBRARY = {"rank": "rank of the experts", "experts": "experts in the library"}


def study_plots(document: Document) -> dict[str, Any]:
    """Everything that the page's script draws.

    Returns:
        `columns` and `heat`, None without any; `answers`, for each question its pictures.
    """
    built = {row["library"] for row in document["libraries"]}
    cells = [cell for cell in document["cells"] if cell["library"] in built]
    return {
        "columns": _columns([row for row in document["columns"] if row["library"] in built]),
        "heat": heat_plot(ScoreTable({"cells": _same_rows(cells)})) if cells else None,
        "answers": [answer_plots(document, answer) for answer in document["answers"]],
    }


def answer_plots(document: Document, answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pictures that say what an answer says: each with its `kind`, and what is drawn."""
    rows = answer["rows"]
    pictures: list[dict[str, Any]] = []
    if compared := [row for row in rows if "difference" in row and row["split"] in SPLITS]:
        pictures += [{"kind": "sweep", **swept} for swept in [sweep(document, compared)] if swept]
        pictures.append({"kind": "differences", "lines": _differences(compared)})
    if gaps := [row for row in rows if row.get("closed") is not None]:
        pictures.append({"kind": "gaps", "panels": _gaps(gaps), "whole": gaps[0]["gap_to"]})
    return [*pictures, *({"kind": "drift", "lines": _drift(row)} for row in rows if "by_layer" in row)]


def sweep(document: Document, compared: Sequence[Row]) -> dict[str, Any] | None:
    """Means over the one number in which the compared cells differ; None where it is not one, or has too few values.

    That is one of the router's settings, or the rank or the count of the library's experts.
    """
    names = dict.fromkeys(name for row in compared for name in (row["cell"], row["against"]))
    columns = {(row["library"] + "/" + row["router"], row["split"]): row for row in document["columns"]}
    settings_by_cell = {name: _settings(document, columns, name) for name in names}
    keys = dict.fromkeys(key for settings in settings_by_cell.values() for key in settings)
    settings_of_cells = list(settings_by_cell.values())
    varied = [key for key in keys if any(s.get(key) != settings_of_cells[0].get(key) for s in settings_of_cells)]
    values = [settings.get(varied[0]) for settings in settings_of_cells] if len(varied) == 1 else []
    # A setting may be a list or a mapping too, which no axis has.
    if not all(isinstance(value, (int, float)) for value in values) or len(set(values)) < max(FEWEST, len(names)):
        return None
    field = varied[0]
    order = sorted(settings_by_cell, key=lambda name: float(settings_by_cell[name][field]))
    lines = []
    for split in SPLITS:
        line_rows = [
            (f"{settings_by_cell[name][field]:g}", columns[name, split]) for name in order if (name, split) in columns
        ]
        # Means over other tasks make no line.
        if len(line_rows) >= FEWEST and len({row["asked"] for _, row in line_rows}) == 1:
            points = [[at, *_points(row)] for at, row in line_rows]
            lines.append({"library": "", "split": split_name(split), "points": points})
    flat_routers = [BASE] if field in OF_LIBRARY else [BASE, ORACLE]
    levels = [
        {"library": "", "split": split_name(split), "router": router, "mean": _points(row)[0]}
        for split in SPLITS
        for router in flat_routers
        if (row := columns.get((f"{order[0].partition('/')[0]}/{router}", split)))
    ]
    drawn = {line["split"] for line in lines}
    levels = [level for level in levels if level["split"] in drawn]
    title = OF_LIBRARY.get(field, f"{field} of {settings_by_cell[order[0]].get('router')}")
    return {"field": field, "title": title, "lines": lines, "levels": levels} if lines else None


def _same_rows(cells: Sequence[Row]) -> list[Row]:
    """The cells over as many rows of their task as any: what fewer rows gave is not held against what more gave."""
    most: dict[str, int] = {}
    for cell in cells:
        most[cell["task"]] = max(most.get(cell["task"], 0), cell["n"])
    return [cell for cell in cells if cell["n"] == most[cell["task"]]]


def _settings(document: Document, columns: Mapping[tuple[str, str], Row], cell: str) -> dict[str, Any]:
    """Everything that two cells may differ in, apart from what libraries learnt."""
    name = cell.partition("/")[0]
    library = next((row for row in document["libraries"] if row["library"] == name), None)
    settings = next((row["setting"] for split in SPLITS if (row := columns.get((cell, split)))), None)
    if library is None or settings is None:
        return {"router": cell}
    ranks = library["ranks"]
    return {
        **settings,
        "rank": ranks[0] if len(ranks) == 1 else str(ranks),
        "experts": library["experts"],
        # A part of a library has private experts.
        "method": "private" if library["method"] == SUBSET else library["method"],
        "clustered_by": library["clustered_by"],
    }


def _columns(columns: Sequence[Row]) -> dict[str, Any] | None:
    """Every cell's mean on every split, those of a library together; the base once, and again on other tasks."""
    names: dict[str, dict[str, Row]] = {}
    libraries = list(dict.fromkeys(row["library"] for row in columns))
    for row in sorted(columns, key=lambda row: (not is_base(row["router"]), libraries.index(row["library"]))):
        first = names.get(row["router"], {}).get(row["split"], row)
        is_shared = is_base(row["router"]) and row["asked"] == first["asked"]
        name = row["router"] if is_shared else f"{row['library']}: {row['router']}"
        names.setdefault(name, {}).setdefault(row["split"], row)
    splits = [split for split in SPLITS if any(row["split"] == split for row in columns)]
    lines = []
    for name, by_split in names.items():
        points = [
            [*_points(by_split[split]), by_split[split]["tasks"]] if split in by_split else None for split in splits
        ]
        lines.append({"name": name, "points": points})
    return {"splits": [split_name(split) for split in splits], "base": BASE, "lines": lines} if lines else None


def _differences(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A line for each comparison, with a point for each split: difference, its interval over rows, that over tasks."""
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        wide = [row[key] for key in ("tasks_low", "tasks_high")]
        point = {
            "split": split_name(row["split"]),
            "verdict": row["verdict"],
            "rows": [rounded_points(row[key]) for key in ("difference", "low", "high")],
            "tasks": None if None in wide else list(map(rounded_points, wide)),
        }
        lines.setdefault((row["cell"], row["against"]), []).append(point)
    return [{"cell": cell, "against": against, "points": points} for (cell, against), points in lines.items()]


def _gaps(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Panels as `lorary.report.evidence_plots.gap_plot` makes them."""
    splits: dict[str, list[Row]] = {}
    for row in rows:
        splits.setdefault(row["split"], []).append(row)
    return [
        {
            "name": split_name(split),
            "routers": [row["cell"] for row in split_rows],
            "points": [[rounded_points(row[key]) for key in ("closed", "low", "high")] for row in split_rows],
        }
        for split, split_rows in splits.items()
    ]


def _drift(row: Row) -> list[dict[str, Any]]:
    """|cosine| of prototypes by the depth of the layer."""
    layers = sorted(row["by_layer"].items(), key=lambda item: int(item[0]))
    return [{"name": f"{row['library']} and {row['against']}", "layers": [int(layer) for layer, _ in layers],
             "values": [round(value, 3) for _, value in layers]}]  # fmt: skip


def _points(row: Row) -> list[float | None]:
    return [rounded_points(row[key]) for key in ("value", "low", "high")]
