"""Columns are compared row by row, and a verdict follows from the interval of their difference."""

import numpy as np
import pytest
import torch

from lorary.evaluate.cells import Cell
from lorary.evaluate.compare import Columns, Difference, GapClosed, Rows, failed_tasks, verdict_of
from lorary.evaluate.statistics import bootstrap_interval
from lorary.evaluate.summary import CellSummary


def paired(values: Rows, against: Rows) -> Difference:
    return Columns({"ours": values, "theirs": against}).difference("ours", "theirs", list(values))


def gap_closed(values: Rows, whole: Rows, base: Rows) -> GapClosed:
    return Columns({"ours": values, "whole": whole, "base": base}).gap_closed("ours", "whole", "base", list(values))


def made(router: str, task: str, values: list[float]) -> Cell:
    mean = sum(values) / len(values)
    return Cell(
        "lib", router, task, "f", "held_in", "em", True, mean, mean, mean, len(values), 0.0, "plain", values=values
    )


def test_a_column_that_is_always_better_is_ahead_and_the_other_behind() -> None:
    ours = {f"task {n}": [1.0] * 20 for n in range(6)}
    theirs = {task: [0.0] * 20 for task in ours}
    found, back = paired(ours, theirs), paired(theirs, ours)
    assert (found.difference, found.low, found.high, found.tasks, found.rows) == (1.0, 1.0, 1.0, 6, 120)
    assert (found.verdict, back.verdict) == ("ahead", "behind")
    assert found.is_wider
    assert found.p_rows < 0.001


def test_a_column_is_level_with_itself() -> None:
    found = paired({"a": [1.0, 0.0]}, {"a": [1.0, 0.0]})
    assert (found.difference, found.verdict, found.p_rows, found.tasks_low) == (0.0, "level", 1.0, None)


def test_five_tasks_show_nothing_over_tasks_and_have_no_interval() -> None:
    # Of five tasks no sign test can say more than 2 / 2^5, and an interval without 0 would say more.
    found = paired({f"task {n}": [1.0] * 20 for n in range(5)}, {f"task {n}": [0.0] * 20 for n in range(5)})
    assert found.verdict == "ahead"
    assert (found.tasks_low, found.tasks_high, found.tasks_verdict) == (None, None, None)
    assert found.p_tasks == pytest.approx(0.0625)
    assert not found.is_wider


def test_three_rows_that_are_all_better_are_no_verdict_and_bound_nothing() -> None:
    # A bootstrap of them could not show a doubt, the signs can: 2 of 8 throws do as much.
    found = paired({"a": [1.0] * 3}, {"a": [0.0] * 3})
    assert found.p_rows == pytest.approx(0.25, abs=0.05)
    assert (found.low, found.high, found.verdict) == (-1.0, 1.0, "level")


@pytest.mark.parametrize("tasks", [1, 4, 6, 13])
def test_interval_p_value_and_verdict_never_disagree(tasks: int) -> None:
    random = np.random.default_rng(tasks)
    verdicts = set()
    for gain in (0.0, 0.05, 0.1, 0.2, 0.4):
        noise = {f"t{n}": random.random(int(random.integers(3, 30))) for n in range(tasks)}
        ours = {task: (own < 0.4 + gain + random.normal(0, 0.1)).astype(float).tolist() for task, own in noise.items()}
        theirs = {task: (random.random(len(own)) < 0.4).astype(float).tolist() for task, own in noise.items()}
        found = paired(ours, theirs)
        assert (found.verdict != "level") == (found.p_rows < 0.05) == (found.low > 0 or found.high < 0)
        wide = found.tasks_verdict is not None and found.tasks_verdict != "level"
        assert wide == (found.p_tasks < 0.05)
        assert (found.tasks_low is None) == (tasks < 6)
        verdicts.add(found.verdict)
    assert len(verdicts) > 1


def test_a_verdict_is_that_of_its_interval() -> None:
    assert [verdict_of(*ends) for ends in ((0.1, 0.2), (-0.2, -0.1), (0.0, 0.2), (-0.2, 0.0))] == [
        "ahead", "behind", "level", "level",
    ]  # fmt: skip


def test_the_gap_closed_lies_between_base_and_whole() -> None:
    base, whole = {"a": [0.0] * 40}, {"a": [1.0] * 40}
    half = gap_closed({"a": [1.0, 0.0] * 20}, whole, base)
    assert half.closed == pytest.approx(0.5)
    assert half.low is not None
    assert half.high is not None
    assert 0.3 < half.low < 0.5 < half.high < 0.7
    nothing = gap_closed(base, base, base)
    assert (nothing.closed, nothing.low, nothing.gap) == (None, None, 0.0)


def test_the_interval_of_a_gap_closed_leaves_out_0_where_the_column_beats_the_base() -> None:
    random = np.random.default_rng(0)
    seen = set()
    for gain in np.linspace(0, 0.3, 12):
        noise = random.random(60)
        rows = [{"a": (noise < level).astype(float).tolist()} for level in (0.9, 0.3)]
        ours = {"a": (random.random(60) < 0.3 + gain).astype(float).tolist()}
        gap, difference = gap_closed(ours, rows[0], rows[1]), paired(ours, rows[1])
        assert gap.low is not None
        assert (gap.low > 0) == (difference.verdict == "ahead")
        seen.add(difference.verdict)
    assert seen == {"ahead", "level"}


def test_a_mean_over_one_task_has_the_interval_of_its_cell() -> None:
    values = (np.random.default_rng(5).random(40) < 0.3).astype(float).tolist()
    found = Columns({"arrow": {"a": values}}).mean("arrow", ["a"])
    assert (found.low, found.high) == pytest.approx(bootstrap_interval(values, task="a"))


def test_nothing_depends_on_the_order_of_columns_and_tasks() -> None:
    random = np.random.default_rng(3)
    values = {name: {f"t{n}": random.random(9).tolist() for n in range(14)} for name in ("one", "two")}
    tasks = list(values["one"])
    there = Columns(values)
    back = Columns({name: dict(reversed(values[name].items())) for name in ("two", "one")})
    assert there.mean("one", tasks) == back.mean("one", tasks[::-1])
    assert there.difference("one", "two", tasks) == back.difference("one", "two", tasks[::-1])


def test_only_a_column_with_scores_takes_a_task_away_by_failing() -> None:
    scored = [("a", "x"), ("a", "y"), ("b", "x"), ("b", "z")]
    failures = [("b", "y"), ("c", "x"), ("a", "w"), ("a", "x"), ("b", "y")]
    assert failed_tasks(scored, failures) == {"y": ["b"], "w": ["a"]}


def test_a_study_and_an_evaluation_say_the_same_of_the_same_cells(generator: torch.Generator) -> None:
    def column(router: str, right: float) -> dict[str, list[float]]:
        return {f"task {n}": (torch.rand(9 + n, generator=generator) < right).double().tolist() for n in range(7)}

    columns = {router: column(router, right) for router, right in (("base", 0.2), ("arrow", 0.6), ("oracle", 0.9))}
    summary = CellSummary([made(router, task, own) for router, rows in columns.items() for task, own in rows.items()])
    (one,) = [c for c in summary.comparisons() if (c.router, c.against) == ("arrow", "base")]
    other = paired(columns["arrow"], columns["base"])
    ours = (other.difference, other.low, other.high, other.tasks_low, other.tasks_high, other.p_rows, other.p_tasks)
    theirs = (one.difference, one.low, one.high, one.tasks_low, one.tasks_high, one.p_rows, one.p_tasks)
    assert ours == pytest.approx(theirs)
    (gap,) = summary.oracle_gaps()
    share = gap_closed(columns["arrow"], columns["oracle"], columns["base"])
    assert (share.closed, share.low, share.high) == pytest.approx((gap.closed, gap.low, gap.high))
