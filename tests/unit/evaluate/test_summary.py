"""What follows from cells."""

from typing import Any

import pytest

from lorary.evaluate.cells import Cell, CellFailure
from lorary.evaluate.summary import CellSummary, Comparison


def cell(router: str, task: str, values: list[float], **changes: Any) -> Cell:
    mean = sum(values) / len(values)
    known = {
        "library": "lib", "router": router, "task": task, "family": "f", "split": "held_in", "metric": "em",
        "primary": True, "value": mean, "low": mean, "high": mean, "n": len(values), "seconds": 0.0,
        "template": "plain", "values": values,
    }  # fmt: skip
    return Cell(**{**known, **changes})


def compared(cells: list[Cell], **wanted: Any) -> list[Comparison]:
    """The comparisons that have these values."""
    return [c for c in CellSummary(cells).comparisons() if all(getattr(c, k) == v for k, v in wanted.items())]


def test_routers_are_compared_row_by_row() -> None:
    # The two routers agree on most rows: a paired interval is narrow where an unpaired one would not be.
    ours, theirs = [1.0, 0.0] * 20, [1.0, 0.0] * 19 + [0.0, 0.0]
    (found,) = CellSummary([cell("uniform", "a", theirs), cell("arrow", "a", ours)]).comparisons()
    assert (found.router, found.against, found.split, found.tasks) == ("arrow", "uniform", "held_in", 1)
    assert found.difference == pytest.approx(1 / 40)
    assert 0.0 <= found.low < found.high < 0.1
    assert found.p_rows == 1.0  # one row in forty is what a coin gives
    assert found.p_tasks == 1.0
    assert found.tasks_low is None


def test_a_difference_that_holds_row_by_row_is_told_from_chance() -> None:
    ours, theirs = [1.0] * 30 + [0.0] * 10, [1.0] * 10 + [0.0] * 30
    tasks = [f"t{i}" for i in range(6)]
    cells = [cell(r, t, v) for t in tasks for r, v in (("base", theirs), ("arrow", ours))]
    (found,) = CellSummary(cells).comparisons()
    assert found.p_rows < 0.01
    assert found.p_tasks == 2 / 2**6
    assert found.tasks_low == found.tasks_high == pytest.approx(0.5)  # all tasks alike
    assert found.low < 0.5 < found.high


def test_tasks_weigh_alike_and_splits_stay_apart() -> None:
    cells = [
        cell("base", "a", [0.0] * 2), cell("arrow", "a", [1.0] * 2),
        cell("base", "b", [0.0] * 50), cell("arrow", "b", [0.0] * 50),
        cell("base", "c", [1.0], split="held_out"), cell("arrow", "c", [0.0], split="held_out"),
    ]  # fmt: skip
    (held_in,), (held_out,) = compared(cells, split="held_in"), compared(cells, split="held_out")
    assert (held_in.difference, held_in.tasks) == (0.5, 2)
    assert (held_out.difference, held_out.tasks) == (-1.0, 1)
    means = {(mean.router, mean.split): mean.mean for mean in CellSummary(cells).means()}
    assert means == {
        ("base", "held_in"): 0.0, ("base", "held_out"): 1.0, ("arrow", "held_in"): 0.5, ("arrow", "held_out"): 0.0,
    }  # fmt: skip


@pytest.mark.parametrize("changes", [{"n": 9}, {"metric": "rougeL"}, {"data": "other"}])
def test_cells_that_answer_other_questions_are_not_compared(changes: dict[str, Any]) -> None:
    cells = [cell("base", "a", [0.0]), cell("arrow", "a", [1.0], **changes)]
    assert CellSummary(cells).comparisons() == []


def test_the_same_router_is_compared_across_libraries_and_the_base_counts_once() -> None:
    cells = [
        cell(router, task, [value, 0.0], library=library)
        for library, value in (("one", 0.0), ("two", 1.0))
        for task in "ab"
        for router in ("base", "uniform", "arrow")
    ]
    found = {(c.library, c.router, c.against_library, c.against) for c in CellSummary(cells).comparisons()}
    assert found == {
        ("one", "uniform", None, "base"), ("one", "arrow", None, "base"), ("one", "arrow", "one", "uniform"),
        ("two", "uniform", None, "base"), ("two", "arrow", None, "base"), ("two", "arrow", "two", "uniform"),
        ("two", "uniform", "one", "uniform"), ("two", "arrow", "one", "arrow"),
    }  # fmt: skip
    (across,) = compared(cells, library="two", router="arrow", against_library="one")
    assert (across.difference, across.split) == (0.5, "held_in")
    assert sum(mean.router == "base" for mean in CellSummary(cells).means()) == 2  # beside each library


def test_a_task_that_one_library_holds_in_and_the_other_out_is_mixed() -> None:
    cells = [
        cell(router, "a", [1.0], library=library, split=split)
        for library, split in (("one", "held_in"), ("two", "held_out"))
        for router in ("base", "arrow")
    ]
    splits = {(c.library, c.against_library): c.split for c in CellSummary(cells).comparisons()}
    # One split for all of them, else a mean and a difference of one name would be over other tasks.
    assert splits == {("one", None): "mixed", ("two", None): "mixed", ("two", "one"): "mixed"}
    assert {mean.split for mean in CellSummary(cells).means()} == {"mixed"}


def test_the_base_guard_names_each_task_and_router_the_base_beats() -> None:
    cells = [
        cell("base", "a", [1.0, 0.0]), cell("arrow", "a", [0.0, 0.0]), cell("uniform", "a", [1.0, 0.0]),
        cell("base", "b", [0.0]), cell("arrow", "b", [1.0]),
    ]  # fmt: skip
    found = CellSummary(cells).base_guard()
    assert [(entry["task"], entry["router"], entry["base"], entry["value"]) for entry in found] == [
        ("a", "arrow", 0.5, 0.0)
    ]


def gap_cells(oracle: float, arrow: float, tasks: int = 6, rows: int = 40) -> list[Cell]:
    """A base that is right on half of the rows, a router and an oracle on so many more."""
    return [
        cell(router, f"t{task}", [float((i * 7 + task) % rows < share * rows) for i in range(rows)])
        for task in range(tasks)
        for router, share in (("base", 0.5), ("arrow", arrow), ("oracle", oracle))
    ]


def test_the_gap_to_the_oracle_is_closed_by_the_share_that_the_router_gains() -> None:
    (found,) = CellSummary(gap_cells(oracle=0.9, arrow=0.7)).oracle_gaps()
    assert (found.router, found.tasks) == ("arrow", 6)
    assert found.gap == pytest.approx(0.4)
    assert found.closed == pytest.approx(0.5)
    assert found.low is not None
    assert found.high is not None
    assert 0.3 < found.low < 0.5 < found.high < 0.7
    assert found.tasks_low == pytest.approx(0.5)


def test_a_router_above_the_oracle_closes_more_than_all_of_the_gap() -> None:
    (found,) = CellSummary(gap_cells(oracle=0.7, arrow=0.9)).oracle_gaps()
    assert found.closed == pytest.approx(2.0)


@pytest.mark.parametrize("oracle", [0.3, 0.5])
def test_no_gap_is_closed_where_the_oracle_does_not_clearly_beat_the_base(oracle: float) -> None:
    (found,) = CellSummary(gap_cells(oracle=oracle, arrow=0.9)).oracle_gaps()
    assert found.gap == pytest.approx(oracle - 0.5)
    assert (found.closed, found.low, found.high, found.tasks_low, found.tasks_high) == (None,) * 5


def test_nothing_follows_from_no_cells() -> None:
    summary = CellSummary([])
    assert (summary.means(), summary.comparisons(), summary.oracle_gaps(), summary.base_guard()) == ([], [], [], [])


def test_a_task_that_a_compared_router_failed_on_is_in_no_figure_and_is_named() -> None:
    cells = [
        cell(router, task, [value + 0.1 * (task == "b"), value])
        for task in "abc"
        for router, value in (("base", 0.1), ("uniform", 0.3), ("arrow", 0.5), ("oracle", 0.9))
        if (router, task) != ("arrow", "b")
    ]
    # Norm has no score at all: it is compared with nothing, and takes no task away.
    failures = [CellFailure("lib", router, task, "rule") for router, task in (("arrow", "b"), ("norm", "a"))]
    summary = CellSummary(cells, failures)
    assert {(mean.router, mean.tasks) for mean in summary.means()} == {
        ("base", 2), ("uniform", 2), ("arrow", 2), ("oracle", 2),
    }  # fmt: skip
    means = {mean.router: mean.mean for mean in summary.means()}
    assert means == pytest.approx({"base": 0.1, "uniform": 0.3, "arrow": 0.5, "oracle": 0.9})
    for found in summary.comparisons():
        assert found.difference == pytest.approx(means[found.router] - means[found.against])
    assert {gap.tasks for gap in summary.oracle_gaps()} == {2}
    assert summary.left_out() == [{"task": "b", "library": "lib", "router": "arrow"}]
    assert {mean.tasks for mean in summary.family_means()} == {2}
    # Without the failures nothing is known to be owed: each router has the mean of what it has.
    assert {mean.router: mean.tasks for mean in CellSummary(cells).means()}["uniform"] == 3


def test_the_guard_tells_a_clear_difference_from_a_small_one() -> None:
    cells = [
        cell("base", "a", [1.0] * 20), cell("arrow", "a", [0.0] * 20),
        cell("base", "b", [1.0] * 20), cell("arrow", "b", [1.0] * 19 + [0.0]),
        cell("base", "c", [1.0]), cell("arrow", "c", [0.0], data="other"),
    ]  # fmt: skip
    verdicts = {entry["task"]: (entry["verdict"], entry["p_rows"]) for entry in CellSummary(cells).base_guard()}
    assert verdicts["a"][0] == "behind"
    assert verdicts["a"][1] < 0.05
    assert verdicts["b"] == ("level", 1.0)
    assert verdicts["c"] == (None, None)


def test_a_task_that_all_routers_failed_on_is_named_and_a_split_without_scores_takes_no_task_away() -> None:
    cells = [cell(router, "a", [0.5]) for router in ("base", "arrow", "uniform")]
    cells += [cell(router, "z", [0.5], split="held_out") for router in ("base", "arrow")]
    failures = [CellFailure("lib", router, "b", "rule") for router in ("base", "arrow", "uniform")]
    # Uniform has no score on held-out tasks at all.
    summary = CellSummary(cells, [*failures, CellFailure("lib", "uniform", "z", "rule")])
    assert [(entry["task"], entry["router"]) for entry in summary.left_out()] == [
        ("b", "base"), ("b", "arrow"), ("b", "uniform"),
    ]  # fmt: skip
    assert {(mean.router, mean.split, mean.tasks) for mean in summary.means()} == {
        ("base", "held_in", 1), ("arrow", "held_in", 1), ("uniform", "held_in", 1),
        ("base", "held_out", 1), ("arrow", "held_out", 1),
    }  # fmt: skip


@pytest.mark.parametrize("failing", ["one", "two"])
def test_a_base_that_was_scored_beside_one_library_did_not_fail(failing: str) -> None:
    cells = [
        cell(router, task, [0.5, 1.0], library=library)
        for library in ("one", "two") for task in "ab" for router in ("base", "arrow")
        if (library, task, router) != (failing, "b", "base")
    ]  # fmt: skip
    summary = CellSummary(cells, [CellFailure(failing, "base", "b", "rule")])
    assert summary.left_out() == []
    assert {mean.tasks for mean in summary.means()} == {2}
