"""JSON, Markdown, terminal, page and study say the same numbers of one evaluation in which a cell failed."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluations import LEVELS, made_up
from pages import Page

from lorary.evaluate.evaluation import Evaluation
from lorary.report.contents import Report
from lorary.report.evaluation_page import render_report
from lorary.report.export import evaluation_csv, evaluation_markdown
from lorary.report.tables import print_evaluation
from lorary.study.context import StudyContext
from lorary.study.parse import read_study
from lorary.study.plots import study_plots
from lorary.study.render import html_sections, markdown
from lorary.study.report import report_document

LACKS = ("arrow[top_k=1]", "in3")
SPLITS = ("held_in", "held_out")


@pytest.fixture
def evaluation() -> Evaluation:
    """Six routers on six tasks; one cell failed, and one router on every task."""
    return made_up(["private"], failed=True, lacks=LACKS)


@pytest.fixture
def document(evaluation: Evaluation) -> dict[str, Any]:
    """What `--json` prints."""
    loaded: dict[str, Any] = json.loads(json.dumps(evaluation.to_json(), allow_nan=False))
    return loaded


def points(value: float) -> str:
    return f"{100 * value:.1f}"


def study_document(
    evaluation: Evaluation, make_study: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, out: Path
) -> dict[str, Any]:
    """The report of a study whose columns are those of the evaluation."""
    path = make_study(
        ("[mbc/arrow, private/arrow]", "[private/arrow, private/base]"),
        ("routers: [arrow, oracle]", "routers: [uniform, 'arrow[top_k=1]', arrow, 'arrow[top_k=8]', oracle]"),
        ("cells: [private/arrow], share_of", "cells: [private/arrow, 'private/arrow[top_k=8]'], share_of"),
    )
    context = StudyContext(read_study(str(path)), out)
    columns, document = {}, evaluation.to_json()
    for router in LEVELS:
        for split in SPLITS:
            cells = [c for c in document["cells"] if c["split"] == split and c["router"] in (router, "base")]
            failures = [f for f in document["failures"] if f["router"] == router and split == "held_in"]
            columns["private", router, split] = {"cells": cells, "failures": failures}
    del columns["private", "base", "held_in"], columns["private", "base", "held_out"]
    scored = {"evaluate:main": columns, "adapt:few": {}}
    monkeypatch.setattr("lorary.study.report.scored_columns", lambda context, keys: (scored, {}))
    return report_document(context, {})


def test_means_differences_and_gaps_are_over_the_same_tasks(document: dict[str, Any]) -> None:
    assert document["left_out"] == [{"task": "in3", "library": "private", "router": "arrow[top_k=1]"}]
    for key in ("means", "loss_means", "comparisons", "oracle_gaps"):
        assert {(row["split"], row["tasks"]) for row in document[key]} == {("held_in", 4), ("held_out", 1)}
    means = {(row["router"], row["split"]): row["mean"] for row in document["means"]}
    assert {router for router, _ in means} == set(LEVELS)  # norm has no score, and no mean
    for row in document["comparisons"]:
        expected = means[row["router"], row["split"]] - means[row["against"], row["split"]]
        assert row["difference"] == pytest.approx(expected)
        assert (row["verdict"] == "level") == (row["low"] <= 0 <= row["high"]) == (row["p_rows"] >= 0.05)
    for row in document["oracle_gaps"]:
        base, oracle = (means[name, row["split"]] for name in ("base", "oracle"))
        if row["closed"] is not None:
            assert row["closed"] == pytest.approx((means[row["router"], row["split"]] - base) / (oracle - base))


def test_the_rows_of_every_cell_are_in_the_document(document: dict[str, Any]) -> None:
    for cell in document["cells"]:
        assert len(cell["values"]) == cell["n"]
        assert sum(cell["values"]) / cell["n"] == pytest.approx(cell["value"])


def test_markdown_terminal_and_page_show_the_numbers_of_the_document(
    evaluation: Evaluation, document: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    text, page = evaluation_markdown(evaluation), Page(render_report(Report("lib", evaluation=document)))
    print_evaluation(evaluation)
    terminal = " ".join(capsys.readouterr().out.split())
    (plots,) = [json.loads(script) for script in page.scripts if script.startswith("{")]
    for row in document["means"]:
        split = row["split"].replace("_", "-")
        interval = f"({points(row['low'])}, {points(row['high'])})"
        assert f"| {row['router']} | {split} | **{points(row['mean'])}** | {interval} |" in text
        assert f"{row['mean']:.3f}" in terminal
        (panel,) = [panel for panel in plots["scores"]["splits"] if panel["name"] == split]
        drawn = panel["groups"][0]["points"][plots["scores"]["routers"].index(row["router"])]
        assert drawn == [*(round(100 * row[key], 2) for key in ("mean", "low", "high")), row["tasks"]]
        low, high = (f"{100 * row[key]:.0f}" for key in ("low", "high"))
        assert re.search(rf"{re.escape(points(row['mean']))} {low}–{high}", page.text)
    for row in document["comparisons"]:
        interval = f"({100 * row['low']:+.1f}, {100 * row['high']:+.1f})"
        if row["against"] == "base":  # Markdown leaves out pairs of routers
            line = f"| **{100 * row['difference']:+.1f}** | {interval} | "
            assert line in text
        assert f"{row['difference']:+.3f} (95 % interval over rows {row['low']:+.3f} to {row['high']:+.3f}" in terminal
    for row in document["oracle_gaps"]:
        (panel,) = [panel for panel in plots["gap"] if panel["name"] == row["split"].replace("_", "-")]
        drawn = panel["points"][panel["routers"].index(row["router"])]
        assert drawn == [round(100 * row[key], 2) for key in ("closed", "low", "high")]
        assert f"**{100 * row['closed']:.0f} %** | ({points(row['low'])}, {points(row['high'])})" in text
        assert f"closes {100 * row['closed']:.0f} % of the gap of {row['gap']:.3f}" in terminal
    for shown in (text, terminal, page.text):
        assert "In no mean, comparison or gap: in3 (failed: arrow[top_k=1])" in shown.replace("\\", "")
    assert len(evaluation_csv(evaluation).splitlines()) == 1 + len(document["cells"])


def test_a_study_of_the_same_cells_says_the_same(
    evaluation: Evaluation,
    document: dict[str, Any],
    make_study: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    study = study_document(evaluation, make_study, monkeypatch, tmp_path / "out")
    columns = {(row["router"], row["split"]): row for row in study["columns"]}
    assert set(columns) == {(router, split) for router in LEVELS for split in SPLITS}
    for row in document["means"]:
        column = columns[row["router"], row["split"]]
        ours = [column[key] for key in ("value", "low", "high", "tasks_low", "tasks_high", "tasks")]
        theirs = [row[key] for key in ("mean", "low", "high", "tasks_low", "tasks_high", "tasks")]
        assert ours == pytest.approx(theirs)
        assert column["left_out"] == (["in3"] if row["split"] == "held_in" else [])
    sections = html_sections(study, study_plots(study))
    numbers = ("difference", "low", "high", "p_rows", "tasks_low", "tasks_high", "p_tasks", "verdict", "tasks")
    compared, gaps = study["answers"][0]["rows"], study["answers"][1]["rows"]
    assert len(compared) == 2
    for answer in compared:
        (row,) = [
            row for row in document["comparisons"]
            if (row["router"], row["against"], row["split"]) == ("arrow", "base", answer["split"])
        ]  # fmt: skip
        assert [answer[key] for key in numbers] == pytest.approx([row[key] for key in numbers])
    assert len(gaps) == 4
    for answer in gaps:
        name = answer["cell"].partition("/")[2]
        (row,) = [r for r in document["oracle_gaps"] if (r["router"], r["split"]) == (name, answer["split"])]
        for key in ("gap", "gain", "closed", "low", "high", "tasks"):
            assert answer[key] == pytest.approx(row[key])
        line = f"private/{name} closes {100 * row['closed']:.0f} % of the gap from the base to private/oracle"
        assert line in markdown(study)
        assert any(line in html for _, _, html in sections)
    assert study["answers"][0]["unfinished"] == []
    left_out = "In no mean, comparison or gap: in3, held-in (failed: private/arrow[top_k=1])"
    assert left_out in markdown(study)
    assert any(left_out in html for _, _, html in sections)
