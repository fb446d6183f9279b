"""Rows with their answers, the matrix of experts and tasks, and the prompt that a page leads with."""

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import drawn as drawn_page
from browser import needs_chromium
from evaluations import LEVELS, TASKS, made_up
from pages import Page

from lorary.data.schema import Row
from lorary.evaluate.cells import Cell
from lorary.evaluate.evaluation import Evaluation, ScoredCells, evaluation_of
from lorary.evaluate.routed_prompt import RoutedPrompt
from lorary.evaluate.settings import EvaluateSettings
from lorary.report import answered_rows as module
from lorary.report.answered_rows import answered_rows
from lorary.report.contents import Report
from lorary.report.evaluation_page import render_report, write_report
from lorary.report.example import example
from lorary.report.expert_matrix import UNKNOWN, expert_matrix
from lorary.report.plots import MOST_DRAWN, means_plot
from lorary.report.table_model import ScoreTable


def table(evaluation: Evaluation) -> ScoreTable:
    return ScoreTable(json.loads(json.dumps(evaluation.to_json(), allow_nan=False)))


def matrix_of(view: dict[str, Any], drawn: dict[str, Any]) -> np.ndarray:
    flat = np.frombuffer(base64.b64decode(view["values"]), dtype="<u2").astype(float)
    return np.where(flat == UNKNOWN, np.nan, flat / drawn["parts"]).reshape(len(drawn["experts"]), -1)


def test_every_row_has_its_prompt_its_answers_and_its_scores() -> None:
    evaluation = made_up(rows=5)
    drawn = answered_rows(table(evaluation))
    assert drawn is not None
    assert drawn["columns"] == list(LEVELS)
    assert [task["task"] for task in drawn["tasks"]] == sorted(TASKS, key=lambda task: (TASKS[task], task))
    cells = {(cell.router, cell.task): cell for cell in evaluation.cells if cell.primary}
    for task in drawn["tasks"]:
        assert task["prompts"] == [f"{task['task']}, question {i}" for i in range(5)]
        assert task["references"] == [[f"right {i}"] for i in range(5)]
        assert len(set(task["texts"])) == len(task["texts"])
        for column, router in enumerate(drawn["columns"]):
            cell = cells[router, task["task"]]
            assert [task["texts"][i] for i in task["answers"][column]] == cell.answers
            assert task["values"][column] == [100 * value for value in cell.values]
    first = drawn["tasks"][1]
    traced = drawn["columns"].index("arrow")
    assert [experts is None for experts in first["experts"]] == [column != traced for column in range(6)]
    strongest = first["experts"][traced]
    assert [drawn["experts"][i] if i >= 0 else None for i in strongest] == [first["task"], None]


def test_cells_that_were_scored_before_answers_were_kept_have_their_scores_alone() -> None:
    document = json.loads(json.dumps(made_up(rows=3).to_json()))
    for cell in document["cells"]:
        del cell["answers"]
    drawn = answered_rows(ScoreTable(document))
    assert drawn is not None
    assert all(answers is None for task in drawn["tasks"] for answers in task["answers"])
    assert all(len(values) == 3 for task in drawn["tasks"] for values in task["values"])
    for key in ("rows", "routing_usage", "expert_losses"):
        del document[key]
    page = Page(render_report(Report("lib", evaluation=document)))
    assert not {"rows", "matrix"} & {attrs["id"] for tag, attrs in page.elements if tag == "section"}


def test_texts_lose_their_middle_where_a_page_would_grow_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = made_up(rows=2)
    long = [Row("in0", "test", "start " + "x" * 5000 + " end", "right") for _ in range(2)]
    evaluation = replace(evaluation, rows={**evaluation.rows, "in0": long})
    monkeypatch.setattr(module, "MOST_TEXT", 8000)
    page = render_report(Report("lib", evaluation=evaluation.to_json()))
    (rows,) = [json.loads(script)["rows"] for script in Page(page).scripts if script.startswith("{")]
    prompt = next(task for task in rows["tasks"] if task["task"] == "in0")["prompts"][0]
    assert (len(prompt), prompt[:6], prompt[-4:]) == (2005, "start ", " end")
    assert "Texts of more than 2,000 characters lose their middle here" in Page(page).text


def test_the_matrix_has_the_share_of_each_expert_on_each_task_and_marks_its_own() -> None:
    drawn = expert_matrix(table(made_up()), {"in0": "z"})
    assert drawn is not None
    assert [expert["name"] for expert in drawn["experts"]] == ["in1", "in2", "in3", "in4", "out|0", "in0"]
    shares, losses = drawn["views"]
    assert (shares["name"], shares["kind"]) == ("arrow", "share")
    names, tasks = ([entry["name"] for entry in drawn[key]] for key in ("experts", "tasks"))
    values = matrix_of(shares, drawn)
    for task in tasks:
        assert values[names.index(task), tasks.index(task)] == pytest.approx(0.25 if task == "in0" else 0.4)
    assert values[names.index("in0"), tasks.index("in3")] == 0.25
    assert values[names.index("in2"), tasks.index("in3")] == 0
    assert drawn["marks"] == sorted([names.index(task), tasks.index(task)] for task in tasks if task != "out|0")
    known = np.argwhere(~np.isnan(matrix_of(losses, drawn))).tolist()
    assert sorted((names[e], tasks[t]) for e, t in known) == [("in0", "out|0"), ("in1", "out|0")]


def test_the_scores_of_experts_alone_stand_in_the_matrix() -> None:
    scored = ScoredCells()
    for router, expert in (("experts[a]", None), ("experts[a+b]", None), ("oracle", "b")):
        labels = ("lib", router, "t", "f", "held_in", "em", True)
        scored.cells.append(Cell(*labels, 0.5, 0.0, 1.0, 2, 1.0, "plain", expert, values=[0.0, 1.0]))
    settings = EvaluateSettings(routers=("experts[a]", "experts[a+b]", "oracle"))
    drawn = expert_matrix(table(evaluation_of(scored, settings, ["lib"], "tiny")), {})
    assert drawn is not None
    (view,) = drawn["views"]
    assert (view["kind"], matrix_of(view, drawn).tolist()) == ("score", [[0.5], [0.5]])
    scored.cells.pop(0)
    assert expert_matrix(table(evaluation_of(scored, settings, ["lib"], "tiny")), {}) is None


def test_the_picture_at_the_top_has_base_average_best_and_oracle_of_every_library() -> None:
    drawn = means_plot(table(made_up(("one", "two"))))
    assert drawn["routers"] == [
        "base", "one: uniform", "one: arrow", "one: oracle", "two: uniform", "two: arrow", "two: oracle",
    ]  # fmt: skip
    assert all(len(split["points"]) == 7 for split in drawn["splits"])


def test_few_routers_are_all_in_the_picture_at_the_top() -> None:
    scored = table(made_up())
    assert len(scored.routers) <= MOST_DRAWN
    assert means_plot(scored)["routers"] == scored.routers


def routed(answer: str, references: tuple[str, ...] = ("Paris",)) -> RoutedPrompt:
    weights = torch.tensor([[[0.75, 0.25], [0.0, 1.0], [0.0, 0.0]]]).repeat(2, 1, 1)
    tokens, layers = ["Cap", "ital\n", "?"], ["l.0.q", "l.1.q"]
    return RoutedPrompt("Capital?", answer, tokens, layers, ["<a>", "b"], weights, references)


def test_the_page_leads_with_a_prompt_whose_answer_is_right() -> None:
    shown = Page(example([routed("Rome"), routed(" Paris\n"), routed("Paris", ())]))
    tokens = [attrs for tag, attrs in shown.elements if "token" in str(attrs.get("class")).split()]
    assert [attrs["title"] for attrs in tokens] == ["<a> 0.75, b 0.25", "b 1.00", "no expert"]
    assert "ital↵" in shown.text
    assert "answer Paris right" in shown.text
    assert example([routed("Rome"), routed("Paris", ())]) == ""


def test_a_page_of_68_tasks_with_50_rows_under_8_columns_stays_below_10_megabytes() -> None:
    draw = np.random.default_rng(0)
    cells, rows = [], {}
    for i in range(68):
        task, split = f"task_{i}", "held_in" if i < 52 else "held_out"
        rows[task] = [
            {"prompt": "word " * 70 + f"{row}?", "references": [f"the right answer {row}"]} for row in range(50)
        ]
        for k in range(1, 9):
            labels = ("lib", f"arrow[top_k={k}]", task, f"family_{i % 9}", split, "em", True)
            values = draw.integers(0, 2, 50).astype(float).tolist()
            answers = [f"an answer of {k} to row {row}" for row in range(50)]
            value = float(np.mean(values))
            cells.append(vars(Cell(*labels, value, 0.0, 1.0, 50, 1.0, "plain", values=values, answers=answers)))
    page = render_report(Report("Large", evaluation={"cells": cells, "rows": rows}))
    assert 1_000_000 < len(page) < 10_000_000


@needs_chromium
def test_a_browser_draws_every_plot_and_lists_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    example_prompts = [routed("Paris"), routed("Rome")]
    write_report(path, Report("lib", evaluation=made_up(("one", "two")).to_json(), routings=example_prompts,
                              losses={"a": (2.0, 1.0), "b": (1.0, 1.5)}))  # fmt: skip
    source = drawn_page(path)
    places = [attrs["id"] for _, attrs in Page(source).elements if str(attrs.get("id")).startswith("plot-")]
    assert places == [
        "plot-means", "plot-heat", "plot-matrix", "plot-scores", "plot-gap", "plot-accuracy", "plot-sweep-0",
        "plot-routing", "plot-losses",
    ]  # fmt: skip
    assert source.count('<article class="row">') == 10
    assert "1 to 10 of 180 rows" in Page(source).text
