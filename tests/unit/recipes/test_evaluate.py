"""What an evaluation concludes from its cells."""

from typing import Any

import pytest

from lorary.errors import LoraryError
from lorary.evaluate.cells import Cell, base_guard, compare
from lorary.recipes.evaluate import EvaluateSettings


def cell(router: str, task: str, values: list[float], **changes: Any) -> Cell:
    mean = sum(values) / len(values)
    known = {
        "library": "lib", "router": router, "task": task, "family": "f", "split": "held_in", "metric": "em",
        "primary": True, "value": mean, "low": mean, "high": mean, "n": len(values), "seconds": 0.0,
        "template": "plain", "values": values,
    }  # fmt: skip
    return Cell(**{**known, **changes})


def by_key(*cells: Cell) -> dict[tuple[str, str], Cell]:
    return {(c.router, c.task): c for c in cells}


def test_routers_are_compared_row_by_row() -> None:
    # The two routers agree on most rows: a paired interval is narrow where an unpaired one would not be.
    ours, theirs = [1.0, 0.0] * 20, [1.0, 0.0] * 19 + [0.0, 0.0]
    found = compare(by_key(cell("arrow", "a", ours), cell("uniform", "a", theirs)), "arrow", "uniform", "held_in")
    assert found is not None
    assert found.difference == pytest.approx(1 / 40)
    assert found.low >= 0.0
    assert found.high < 0.1
    assert found.tasks == 1


def test_tasks_weigh_alike_and_splits_stay_apart() -> None:
    cells = by_key(
        cell("arrow", "a", [1.0] * 2), cell("base", "a", [0.0] * 2),
        cell("arrow", "b", [0.0] * 50), cell("base", "b", [0.0] * 50),
        cell("arrow", "c", [0.0], split="held_out"), cell("base", "c", [1.0], split="held_out"),
    )  # fmt: skip
    held_in, held_out = (compare(cells, "arrow", "base", split) for split in ("held_in", "held_out"))
    assert held_in is not None
    assert held_out is not None
    assert (held_in.difference, held_in.tasks) == (0.5, 2)
    assert (held_out.difference, held_out.tasks) == (-1.0, 1)


def test_a_split_without_tasks_has_no_comparison() -> None:
    cells = by_key(cell("arrow", "a", [1.0]), cell("base", "a", [0.0]))
    assert compare(cells, "arrow", "base", "held_out") is None


def test_the_base_guard_names_each_task_and_router_the_base_beats() -> None:
    cells = by_key(
        cell("base", "a", [1.0, 0.0]), cell("arrow", "a", [0.0, 0.0]), cell("uniform", "a", [1.0, 0.0]),
        cell("base", "b", [0.0]), cell("arrow", "b", [1.0]),
    )  # fmt: skip
    found = base_guard(cells, ["base", "arrow", "uniform"])
    assert [(entry["task"], entry["router"], entry["base"], entry["value"]) for entry in found] == [
        ("a", "arrow", 0.5, 0.0)
    ]


@pytest.mark.parametrize("changes", [{"routers": ("arow",)}, {"top_k": 0}, {"temperature": 0.0}, {"rows": 0}])
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(LoraryError, match="found:"):
        EvaluateSettings(**changes)
