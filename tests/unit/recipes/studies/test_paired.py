"""Columns are compared row by row; a verdict needs an interval and a p-value."""

import pytest

from lorary.recipes.studies.paired import paired, share_of_gain


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
    assert share_of_gain(base, base, base) is None
    assert share_of_gain(base, {"b": [1.0]}, base) is None
