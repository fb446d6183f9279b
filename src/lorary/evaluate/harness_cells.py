"""Cells out of the results of lm-evaluation-harness."""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lorary.evaluate.cells import Cell

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


def cells_of(
    found: Mapping[str, Any], seconds: Mapping[str, float], held_in: Collection[str], **labels: Any
) -> list[HarnessCell]:
    """All metrics of all tasks and groups, in the order of the harness.

    Of the metrics of a task the first one counts that is a score in 0..1 and better where it is higher; a task that
    has perplexities alone has none.

    Args:
        found: what the harness's `evaluate` gave.
        seconds: that each task took.
        held_in: tasks that experts were trained on.
        labels: `library`, `router` and `template`.

    Returns:
        The cells.
    """
    return [cell for task in found["results"] for cell in _of_task(task, found, seconds, held_in, labels)]


def _of_task(
    task: str,
    found: Mapping[str, Any],
    seconds: Mapping[str, float],
    held_in: Collection[str],
    labels: Mapping[str, Any],
) -> Iterator[HarnessCell]:
    results, is_first = found["results"][task], True
    members = _members(task, found)
    for name, value in results.items():
        metric, _, kind = name.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        is_score = found["higher_is_better"].get(task, {}).get(metric) is not False and 0 <= value <= 1
        stderr = _number(results.get(f"{metric}_stderr,{kind}"))
        low, high = value - NORMAL * (stderr or 0.0), value + NORMAL * (stderr or 0.0)
        yield HarnessCell(
            **labels,
            task=task,
            family=FAMILY,
            split="held_in" if task in held_in else "held_out",
            metric=metric,
            primary=is_score and is_first,
            value=float(value),
            low=max(low, 0.0) if is_score else low,
            high=min(high, 1.0) if is_score else high,
            n=sum(int(found["n-samples"][member]["effective"]) for member in members),
            seconds=sum(seconds.get(member, 0.0) for member in members),
            filter=kind,
            stderr=stderr,
            shots=int(found["n-shot"].get(task) or 0),
        )
        is_first = is_first and not is_score


def _members(task: str, found: Mapping[str, Any]) -> list[str]:
    """The tasks below a group; a task is its own only member."""
    below = found.get("group_subtasks", {}).get(task)
    return [leaf for member in below for leaf in _members(member, found)] if below else [task]


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
