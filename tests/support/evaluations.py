"""Evaluations that were never run: cells with made-up rows, and all that follows from them."""

from collections.abc import Sequence

import numpy as np

from lorary.data.schema import Row
from lorary.evaluate.cells import Cell, CellFailure
from lorary.evaluate.evaluation import Evaluation, ExpertLosses, ScoredCells, evaluation_of
from lorary.evaluate.routing_accuracy import RoutingAccuracy, RoutingUsage
from lorary.evaluate.settings import EvaluateSettings
from lorary.evaluate.statistics import bootstrap_interval

LEVELS = {
    "base": 0.3, "uniform": 0.25, "arrow[top_k=1]": 0.5, "arrow": 0.6, "arrow[top_k=8]": 0.55, "oracle": 0.9,
}  # fmt: skip
TASKS = {f"in{i}": ("held_in", f"family{i % 2}") for i in range(5)} | {"out|0": ("held_out", "other")}


def made_up(
    libraries: Sequence[str] = ("lib",),
    *,
    failed: bool = False,
    rows: int = 30,
    lacks: tuple[str, str] | None = None,
) -> Evaluation:
    """Routers of the levels above on six tasks; the second library holds the last task in.

    Args:
        libraries: their names.
        failed: whether a router that has no score at all failed.
        rows: of each task.
        lacks: router and task of a cell of the first library that failed.
    """
    found = ScoredCells()
    found.rows = {
        task: [Row(task, "test", f"{task}, question {i}", f"right {i}") for i in range(rows)] for task in TASKS
    }
    for number, library in enumerate(libraries):
        for task, (split, family) in TASKS.items():
            own = "held_in" if number == 1 else split
            draw = np.random.default_rng(len(task) + int(task[-1]))
            noise = draw.random(rows)
            for router, level in LEVELS.items():
                if number == 0 and (router, task) == lacks:
                    found.failures.append(CellFailure(library, router, task, "logits must be finite", "nan"))
                    continue
                values = (noise < level + (0.05 * number if router != "base" else 0)).astype(float).tolist()
                low, high = bootstrap_interval(values)
                answers = [f"right {i}" if value else f"not by {router}" for i, value in enumerate(values)]
                for metric in ("loss", "em"):
                    cell = Cell(
                        library, router, task, family, own, metric, metric == "em", sum(values) / rows, low, high, rows,
                        1.0, "plain", values=values, answers=answers if metric == "em" else [],
                    )  # fmt: skip
                    found.cells.append(cell)
            strongest = [(task, 0.6), (None, 0.5)]
            found.routing_usage.append(RoutingUsage(library, "arrow", task, {task: 0.4, "in0": 0.25}, strongest))
            if own == "held_out":
                found.expert_losses.append(ExpertLosses(library, task, "val", 4, {"in0": 2.5, "in1": 1.25}))
            if own == "held_in":
                found.routing.append(RoutingAccuracy(library, "arrow", task, family, task, 0.4, 0.5, 0.2, 8))
    if failed:
        found.failures.append(CellFailure(libraries[0], "norm", "in0", "a <rule> | that must hold", "another"))
    settings = EvaluateSettings(routers=tuple(LEVELS))
    return evaluation_of(found, settings, libraries, "tiny")
