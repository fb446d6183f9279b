"""Cells out of the results of lm-evaluation-harness, which is not needed for them: tables print them."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

from lorary.evaluate.cells import OF_ROWS, Cell
from lorary.evaluate.summary import CellSummary

FAMILY = "lm-evaluation-harness"
# Half of a 95 % interval, in standard errors.
NORMAL = 1.96


@dataclass(frozen=True)
class HarnessCell(Cell):
    """One router on one task or group under one metric and filter of the harness.

    Args:
        filter: what the harness did to answers before it scored them; `none` where nothing.
        stderr: standard error of `value` as the harness has it; None where it has none, and then no interval either.
        shots: examples in each prompt.
    """

    filter: str = "none"
    stderr: float | None = None
    shots: int = 0


@dataclass(frozen=True)
class HarnessResult:
    """All cells, in the order of routers and tasks, and the tasks on which the base beats a router."""

    cells: list[HarnessCell]
    library: str
    base: str
    settings: Mapping[str, Any]

    @property
    def guard(self) -> list[dict[str, Any]]:
        """Every task on which the base alone beats a router, by name."""
        return CellSummary(self.cells).base_guard()

    def to_json(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        cells = [{key: value for key, value in asdict(cell).items() if key not in OF_ROWS} for cell in self.cells]
        versions = {"lm_eval": version("lm_eval"), "lorary": version("lorary")}
        return {
            "library": self.library, "base": self.base, "settings": dict(self.settings), "versions": versions,
            "cells": cells, "base_guard": self.guard,
        }  # fmt: skip


def cells_of(
    report: Mapping[str, Any], seconds: Mapping[str, float], held_in: Collection[str], **labels: Any
) -> list[HarnessCell]:
    """All metrics of all tasks and groups of one router, in the order of the harness.

    Args:
        report: what the harness's `evaluate` gave.
        seconds: that each task took.
        held_in: tasks that experts were trained on.
        labels: `library`, `router` and `template`.

    Returns:
        The cells; `primary` are all that might count, of which `choose_primary` takes one.
    """
    return [cell for task in report["results"] for cell in _of_task(task, report, seconds, held_in, labels)]


def choose_primary(cells: Sequence[HarnessCell]) -> list[HarnessCell]:
    """Let one metric of each task count, the same for all routers, which could not be compared otherwise.

    That is the first one that is better where it is higher and in 0..1 for every router: some scores (a correlation)
    are so for one router and below 0 for another. A task that has perplexities alone has none.

    Args:
        cells: of all routers on all tasks.

    Returns:
        The cells with `primary` as it counts, in the order given.
    """
    routers = {cell.router for cell in cells}
    fits: dict[str, dict[tuple[str, str], set[str]]] = {}
    for cell in cells:
        routers_of = fits.setdefault(cell.task, {}).setdefault((cell.metric, cell.filter), set())
        routers_of.update([cell.router] if cell.primary else [])
    first = {
        task: next((name for name, routers_of in by.items() if routers_of == routers), None)
        for task, by in fits.items()
    }
    return [replace(cell, primary=first[cell.task] == (cell.metric, cell.filter)) for cell in cells]


def _of_task(
    task: str,
    report: Mapping[str, Any],
    seconds: Mapping[str, float],
    held_in: Collection[str],
    labels: Mapping[str, Any],
) -> Iterator[HarnessCell]:
    results = report["results"][task]
    members = _members(task, report)
    for name, value in results.items():
        metric, _, kind = name.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        is_score = report["higher_is_better"].get(task, {}).get(metric) is not False and 0 <= value <= 1
        stderr = _number(results.get(f"{metric}_stderr,{kind}"))
        low, high = value - NORMAL * (stderr or 0.0), value + NORMAL * (stderr or 0.0)
        yield HarnessCell(
            **labels,
            task=task,
            family=FAMILY,
            split="held_in" if task in held_in else "held_out",
            metric=metric,
            primary=is_score,
            value=float(value),
            low=max(low, 0.0) if is_score else low,
            high=min(high, 1.0) if is_score else high,
            n=sum(int(report["n-samples"][member]["effective"]) for member in members),
            seconds=sum(seconds.get(member, 0.0) for member in members),
            filter=kind,
            stderr=stderr,
            shots=int(report["n-shot"].get(task) or 0),
        )


def _members(task: str, report: Mapping[str, Any]) -> list[str]:
    """The tasks below a group; a task is its own only member."""
    below = report.get("group_subtasks", {}).get(task)
    return [leaf for member in below for leaf in _members(member, report)] if below else [task]


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
