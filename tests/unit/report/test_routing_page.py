"""What the page says of an evaluation of several libraries, and the numbers behind its plots."""

import json
from typing import Any

import pytest
from evaluations import LEVELS, TASKS, made_up
from pages import Page

from lorary.report.contents import Report
from lorary.report.evaluation_page import render_report
from lorary.report.evidence_plots import gap_plot, heat_plot, routing_shares, sweeps
from lorary.report.headline import headline
from lorary.report.table_model import ScoreTable


def document(*libraries: str, failed: bool = False) -> dict[str, Any]:
    """The JSON document, as a page is given it."""
    loaded: dict[str, Any] = json.loads(json.dumps(made_up(libraries, failed=failed).to_json(), allow_nan=False))
    return loaded


def test_columns_of_two_libraries_are_told_apart_and_the_base_counts_once() -> None:
    board = ScoreTable(document("one", "two"))
    names = [name for name in LEVELS if name != "base"]
    assert board.routers == ["base", *(f"{library}: {name}" for library in ("one", "two") for name in names)]
    assert board.main == "two: arrow"  # the best of all
    assert board.splits == ["held_in", "mixed"]
    assert len(board.lines("mixed")) == 1
    assert board.difference("one: arrow", "base", "held_in") is not None
    assert board.difference("one: arrow", "two: arrow", "held_in") is not None


def test_with_many_columns_the_headline_names_base_best_and_oracle() -> None:
    text = Page(headline(ScoreTable(document("one", "two")))).text
    first = text.split(". On")[0]
    assert "the base alone" in first
    assert "two: oracle" in first
    assert "one: oracle" not in first


def test_the_verdict_says_when_a_difference_holds_on_these_tasks_only() -> None:
    board = ScoreTable(document("lib"))
    page = Page(headline(board)).text
    found = board.difference("arrow", "base", "held_in")
    assert found is not None
    # Five tasks cannot show anything over tasks: no interval over tasks beside a p-value that says so.
    assert (found.tasks_low, found.tasks_high) == (None, None)
    assert "better on these tasks" in page
    assert board.difference("base", "arrow", "held_in") == (
        -found.value, -found.high, -found.low, found.tasks, None, None, found.p_rows, found.p_tasks,
    )  # fmt: skip
    assert 0 < found.p_rows < 0.05 < found.p_tasks  # as the evaluation's own comparison has them


def test_the_heat_map_has_every_task_and_router_and_gains_over_the_base() -> None:
    heat = heat_plot(ScoreTable(document("lib")))
    assert heat["routers"] == list(LEVELS)
    assert [row["task"] for row in heat["rows"]] == sorted(TASKS, key=lambda task: (TASKS[task], task))
    for row in heat["rows"]:
        assert row["gains"][0] == 0
        assert row["gains"][3] == pytest.approx(row["values"][3] - row["values"][0], abs=0.11)


def test_routers_that_differ_in_one_number_are_a_sweep_in_the_order_of_the_number() -> None:
    (sweep,) = sweeps(ScoreTable(document("one", "two")))
    assert (sweep["title"], sweep["field"]) == ("top_k of arrow", "top_k")  # 4 is what arrow is given without brackets
    assert [(line["library"], line["split"]) for line in sweep["lines"]] == [
        ("one", "held-in"), ("one", "mixed"), ("two", "held-in"), ("two", "mixed"),
    ]  # fmt: skip
    assert all([point[0] for point in line["points"]] == ["1", "4", "8"] for line in sweep["lines"])
    assert {level["router"] for level in sweep["levels"]} == {"base", "oracle"}


def test_gaps_and_routing_stand_by_split_and_by_family() -> None:
    board = ScoreTable(document("lib"))
    assert [panel["name"] for panel in gap_plot(board)] == ["held-in", "held-out"]
    shares = routing_shares(board)
    assert shares is not None
    assert [group["family"] for group in shares["splits"][0]["groups"]] == [None, "family0", "family1"]
    assert shares["splits"][0]["groups"][0]["points"] == [[40.0, 40.0, 40.0, 5.0]]
    assert shares["chance"] == [20.0]


def test_the_page_has_a_section_for_all_of_it_and_names_what_failed() -> None:
    page = Page(render_report(Report("lib", evaluation=document("lib", failed=True))))
    ids = [attrs["id"] for tag, attrs in page.elements if tag == "section"]
    assert ids == [
        "result", "table", "heat", "matrix", "families", "gap", "accuracy", "sweeps", "rows", "reading",
    ]  # fmt: skip
    assert "1 cell could not be scored" in page.text
    assert "norm on in0: a <rule> | that must hold" in page.text


def test_an_evaluation_in_which_all_failed_is_a_page_that_says_so() -> None:
    nothing = {key: [] for key in ("cells", "means", "comparisons", "oracle_gaps", "routing", "base_guard")}
    page = Page(render_report(Report("lib", evaluation={**document("lib", failed=True), **nothing})))
    assert "1 cell could not be scored" in page.text
