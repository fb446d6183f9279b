"""The numbers behind the plots of an evaluation beside its means: heat map, gap, routing, sweeps."""

import json
from collections.abc import Mapping
from typing import Any

from lorary.report.table_model import BASE, SPLITS, ScoreTable, is_told

# Settings that a sweep may go through, as axis titles have them.
SWEPT = ("top_k", "temperature", "top_p", "threshold", "null", "candidates")
# Fewer values are no sweep.
FEWEST = 3


def heat_plot(table: ScoreTable) -> dict[str, Any]:
    """Values of every task under every column, in points of 100, and what they gain over the base."""
    tasks = []
    for line in (line for split in table.splits for line in table.lines(split)):
        cells = [table.primary.get((router, line.name)) for router in table.routers]
        base = table.primary.get((BASE, line.name))
        values = [None if cell is None else round(100 * cell["value"], 1) for cell in cells]
        gains = [None if not (cell and base) else round(100 * (cell["value"] - base["value"]), 1) for cell in cells]
        tasks.append({"task": line.name, "family": line.family, "split": line.split, "values": values, "gains": gains})
    return {"routers": table.routers, "rows": tasks}


def gap_plot(table: ScoreTable) -> list[dict[str, Any]]:
    """How much of the way from the base to the oracle each router goes, in hundredths, split by split."""
    panels = []
    for split, name in SPLITS.items():
        gaps = [gap for gap in table.gaps if gap["split"] == split and gap["closed"] is not None]
        if gaps:
            points = [[rounded_points(gap[key]) for key in ("closed", "low", "high")] for gap in gaps]
            panels.append({"name": name, "routers": [gap["router"] for gap in gaps], "points": points})
    return panels


def routing_shares(table: ScoreTable) -> dict[str, Any] | None:
    """Share of the routing that the task's own expert gets, by family, as `score_plot` has means; None without any."""
    if not table.routing:
        return None
    routers = list(dict.fromkeys(share["router"] for share in table.routing))
    families = sorted({str(share["family"]) for share in table.routing})
    means = {(mean["router"], mean["family"]): mean for mean in table.routing_means}
    panels = []
    for key, name in (("share", "share of the weight"), ("top1", "is the strongest expert")):
        groups = [
            {"family": family, "points": [_routing_point(means.get((router, family)), key) for router in routers]}
            for family in [None, *families]
        ]
        panels.append({"name": name, "groups": groups})
    chance = sorted({round(100 * share["chance"], 1) for share in table.routing})
    main = table.main if table.main in routers else routers[0]
    return {"routers": routers, "base": BASE, "main": main, "splits": panels, "chance": chance}


def sweeps(table: ScoreTable) -> list[dict[str, Any]]:
    """Routers that differ in one number, as lines over it: one entry for each rule and number that was varied."""
    swept: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for field in SWEPT:
        groups: dict[str, dict[float, str]] = {}
        for router, setting in table.settings.items():
            value = setting.get(field)
            if isinstance(value, (int, float)) and not setting.get("experts"):
                constants = {key: fixed for key, fixed in setting.items() if key != field}
                groups.setdefault(json.dumps(constants, sort_keys=True), {}).setdefault(float(value), router)
        for group, routers in groups.items():
            if len(routers) >= FEWEST:
                lines = _lines(table, dict(sorted(routers.items())))
                swept.setdefault((json.loads(group)["router"], field), []).extend(lines)
    return [{"field": field, "title": f"{field} of {router}", "lines": lines, "levels": _levels(table)}
            for (router, field), lines in swept.items() if lines]  # fmt: skip


def _lines(table: ScoreTable, routers: Mapping[float, str]) -> list[dict[str, Any]]:
    """A line for each library and split."""
    lines = []
    for library in dict.fromkeys(mean["library"] for mean in table.means):
        for split, name in SPLITS.items():
            means = {m["router"]: m for m in table.means if (m["library"], m["split"]) == (library, split)}
            points = [
                [f"{value:g}", *(rounded_points(means[router][key]) for key in ("mean", "low", "high"))]
                for value, router in routers.items()
                if router in means
            ]
            if len(points) >= FEWEST:
                lines.append({"library": library, "split": name, "points": points})
    return lines


def _levels(table: ScoreTable) -> list[dict[str, Any]]:
    """Means of the base and of the oracle, to draw beside a sweep."""
    return [
        {"library": m["library"], "split": SPLITS[m["split"]], "router": m["router"], "mean": rounded_points(m["mean"])}
        for m in table.means
        if m["router"] == BASE or is_told(m["router"])
    ]


def _routing_point(mean: Mapping[str, Any] | None, key: str) -> list[float | None] | None:
    if mean is None:
        return None
    return [*(rounded_points(mean[name]) for name in (key, f"{key}_low", f"{key}_high")), float(mean["tasks"])]


def rounded_points(value: float | None) -> float | None:
    """A value in 0..1 in points of 100, short enough for a page; None stays."""
    return None if value is None else round(100 * value, 2)
