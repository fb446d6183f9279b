"""Cells of an evaluation, and what follows from them: paired comparisons of routers, and the base guard."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorary.evaluate.statistics import stratified_interval


@dataclass(frozen=True)
class Cell:
    """One router on one task under one metric.

    Args:
        library: name of the library.
        router: name of the router.
        task: name of the task.
        family: its family.
        split: `held_in` if an expert was trained on it, else `held_out`.
        metric: what `value` is.
        primary: whether this is the one cell of (router, task) that counts; its value is in 0..1.
        value: mean over rows.
        low: lower end of the 95 % bootstrap interval over rows.
        high: its upper end.
        n: number of rows.
        seconds: time that scoring these rows took (all metrics of the router and task together).
        template: prompt template.
        expert: the expert that the oracle used.
        values: one per row, for paired comparisons.
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
    values: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """A paired difference of two routers over the tasks of a split: mean of task means, with a 95 % interval."""

    router: str
    against: str
    split: str
    difference: float
    low: float
    high: float
    tasks: int


def compare(primary: Mapping[tuple[str, str], Cell], router: str, against: str, split: str) -> Comparison | None:
    """Paired difference of two routers: row by row inside each task, tasks weighted alike."""
    groups = [
        [x - y for x, y in zip(cell.values, primary[against, task].values, strict=True)]
        for (name, task), cell in primary.items()
        if name == router and cell.split == split and (against, task) in primary
    ]
    if not groups:
        return None
    low, high = stratified_interval(groups)
    mean = sum(sum(group) / len(group) for group in groups) / len(groups)
    return Comparison(router, against, split, mean, low, high, len(groups))


def base_guard(primary: Mapping[tuple[str, str], Cell], routers: Sequence[str]) -> list[dict[str, Any]]:
    """Every task on which the base alone beats a router, by name."""
    found = []
    for (router, task), cell in primary.items():
        base = primary.get(("base", task))
        if router != "base" and router in routers and base is not None and base.value > cell.value:
            entry = {"task": task, "router": router, "split": cell.split, "metric": cell.metric}
            found.append({**entry, "base": base.value, "value": cell.value})
    return found
