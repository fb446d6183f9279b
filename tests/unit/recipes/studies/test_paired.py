"""Columns are compared row by row; a verdict needs an interval and a p-value."""

import pytest
import torch

from lorary.evaluate.cells import Cell
from lorary.evaluate.summary import Summary
from lorary.recipes.studies.paired import paired, share_of_gain


def made(router: str, task: str, values: list[float]) -> Cell:
    mean = sum(values) / len(values)
    return Cell(
        "lib", router, task, "f", "held_in", "em", True, mean, mean, mean, len(values), 0.0, "plain", values=values
    )


def test_a_column_that_is_always_better_is_ahead_and_the_other_behind() -> None:
    ours = {f"task {n}": [1.0] * 20 for n in range(6)}
    theirs = {task: [0.0] * 20 for task in ours}
    found, back = paired(ours, theirs), paired(theirs, ours)
    assert found is not None
    assert back is not None
    assert (found.difference, found.low, found.high, found.tasks, found.rows) == (1.0, 1.0, 1.0, 6, 120)
    assert (found.verdict, back.verdict) == ("ahead", "behind")
    assert found.is_wider
    assert found.p < 0.001


def test_a_column_is_level_with_itself() -> None:
    found = paired({"a": [1.0, 0.0]}, {"a": [1.0, 0.0]})
    assert found is not None
    assert (found.difference, found.verdict, found.p, found.tasks_low) == (0.0, "level", 1.0, None)


def test_what_holds_over_tasks_needs_an_interval_and_a_p_value_too() -> None:
    # Of five tasks no sign test can say more than 2 / 2^5.
    found = paired({f"task {n}": [1.0] * 20 for n in range(5)}, {f"task {n}": [0.0] * 20 for n in range(5)})
    assert found is not None
    assert found.verdict == "ahead"
    assert found.tasks_low == 1.0
    assert found.p_tasks == pytest.approx(0.0625)
    assert not found.is_wider


def test_an_interval_without_zero_does_not_suffice_where_chance_could_do_as_much() -> None:
    # Three rows, all better: a bootstrap of them cannot show a doubt, the signs can: 2 of 8 throws do as much.
    found = paired({"a": [1.0] * 3}, {"a": [0.0] * 3})
    assert found is not None
    assert found.low > 0
    assert found.p == pytest.approx(0.25, abs=0.05)
    assert found.verdict == "level"


def test_only_tasks_and_rows_that_both_have_are_compared() -> None:
    found = paired({"a": [1.0, 0.0, 0.0], "b": [1.0]}, {"a": [0.0, 0.0], "c": [1.0]})
    assert found is not None
    assert (found.difference, found.tasks, found.rows) == (0.5, 1, 2)
    assert paired({"a": [1.0]}, {"b": [1.0]}) is None


def test_the_share_of_a_gain_lies_between_base_and_whole() -> None:
    base, whole = {"a": [0.0] * 40}, {"a": [1.0] * 40}
    half = share_of_gain({"a": [1.0, 0.0] * 20}, whole, base)
    assert half is not None
    assert half.share == pytest.approx(0.5)
    assert 0.3 < half.low < 0.5 < half.high < 0.7
    nothing = share_of_gain(base, base, base)
    assert nothing is not None
    assert (nothing.share, nothing.whole) == (None, 0.0)
    assert share_of_gain(base, {"b": [1.0]}, base) is None
    # Columns of other numbers of rows share the first ones.
    fewer = share_of_gain({"a": [1.0] * 10}, whole, base)
    assert fewer is not None
    assert (fewer.share, fewer.rows) == (1.0, 10)


def test_a_study_and_an_evaluation_say_the_same_of_the_same_cells(generator: torch.Generator) -> None:
    def column(router: str, right: float) -> dict[str, list[float]]:
        return {f"task {n}": (torch.rand(9 + n, generator=generator) < right).double().tolist() for n in range(7)}

    columns = {router: column(router, right) for router, right in (("base", 0.2), ("arrow", 0.6), ("oracle", 0.9))}
    summary = Summary([made(router, task, own) for router, rows in columns.items() for task, own in rows.items()])
    (one,) = [c for c in summary.comparisons() if (c.router, c.against) == ("arrow", "base")]
    other = paired(columns["arrow"], columns["base"])
    assert other is not None
    ours = (other.difference, other.low, other.high, other.tasks_low, other.tasks_high, other.p, other.p_tasks)
    theirs = (one.difference, one.low, one.high, one.tasks_low, one.tasks_high, one.p_rows, one.p_tasks)
    assert ours == pytest.approx(theirs)
    (gap,) = summary.oracle_gaps()
    share = share_of_gain(columns["arrow"], columns["oracle"], columns["base"])
    assert share is not None
    assert (share.share, share.low, share.high) == pytest.approx((gap.closed, gap.low, gap.high))
