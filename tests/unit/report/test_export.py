"""An evaluation as CSV, as Markdown and in the terminal."""

import csv
import io
import re
from dataclasses import replace

import pytest
from evaluations import LEVELS, TASKS, made_up

from lorary.evaluate.evaluation import ScoredCells, evaluation_of
from lorary.report.export import evaluation_csv, evaluation_markdown
from lorary.report.tables import print_evaluation


def test_every_cell_is_a_line_of_csv_and_its_values_read_back() -> None:
    evaluation = made_up()
    lines = list(csv.DictReader(io.StringIO(evaluation_csv(evaluation))))
    assert len(lines) == len(evaluation.cells) == 2 * len(LEVELS) * len(TASKS)
    for line, cell in zip(lines, evaluation.cells, strict=True):
        assert (line["router"], line["task"], line["metric"]) == (cell.router, cell.task, cell.metric)
        assert float(line["value"]) == cell.value
        assert line["expert"] == ""
    assert "values" not in lines[0]


def test_names_neither_break_a_line_of_csv_nor_are_formulas_nor_images() -> None:
    evaluation = made_up()
    names = ["a\rb", "=1+1", "![x](http://127.0.0.1/p.png)"]
    cells = [replace(cell, task=name) for name, cell in zip(names, evaluation.cells, strict=False)]
    found = list(csv.DictReader(io.StringIO(evaluation_csv(replace(evaluation, cells=cells)))))
    assert [line["task"] for line in found] == ["a b", "'=1+1", names[2]]
    cells = [replace(cell, library=names[2]) for cell in evaluation.cells]
    assert "](" not in evaluation_markdown(replace(evaluation, cells=cells)).replace("]\\(", "")


@pytest.mark.parametrize(
    "name",
    ["=1", "+1", "-1", "@A1", " =1", "\u00a0=1", "\t=1", "\n=1", "\u200b=1", "\ufeff=1", "\x00=1", "＝1", "＋1", "－1",
     "＠A", "﹦1", " ＝1", "\tplain", "\rplain"],
)  # fmt: skip
def test_a_cell_that_a_spreadsheet_could_take_for_a_formula_is_a_text(name: str) -> None:
    evaluation = made_up()
    cells = [replace(cell, task=name) for cell in evaluation.cells]
    found = list(csv.DictReader(io.StringIO(evaluation_csv(replace(evaluation, cells=cells)))))
    assert {line["task"] for line in found} == {"'" + name.replace("\r", " ")}


@pytest.mark.parametrize("name", ["plain", "a=b", "2-1", "", "größer"])
def test_a_cell_of_plain_text_is_as_it_is(name: str) -> None:
    evaluation = made_up()
    cells = [replace(cell, task=name) for cell in evaluation.cells]
    found = list(csv.DictReader(io.StringIO(evaluation_csv(replace(evaluation, cells=cells)))))
    assert {line["task"] for line in found} == {name}


HOSTILE = "a\x1b[31m|`<b>\u202e www.x.org https://x.org \\| ![i](u) [r][s]\nb\x9b"


def test_a_hostile_name_stays_one_cell_of_markdown_without_links_code_or_tags() -> None:
    evaluation = made_up()
    cells = [replace(cell, task=HOSTILE) for cell in evaluation.cells]
    row = next(line for line in evaluation_markdown(replace(evaluation, cells=cells)).splitlines() if "x.org" in line)
    bare, plain = (re.sub(r"\\.", "", line) for line in (row, evaluation_markdown(made_up()).splitlines()[-1]))
    assert bare.count("|") == plain.count("|")
    for sign in ("\x1b", "\x9b", "\u202e", "<b", "://", "www.", "](", "]["):
        assert sign not in bare
    assert "`" not in bare


def test_a_hostile_name_moves_nothing_in_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = made_up()
    cells = [replace(cell, task=HOSTILE, library="l\x1b]0;x\x07") for cell in evaluation.cells]
    print_evaluation(evaluation_of(ScoredCells(cells), evaluation.settings, ["l\x1b]0;x\x07"], "tiny"))
    out = capsys.readouterr().out
    assert not set(out) & {"\x1b", "\x9b", "\x07", "\u202e"}
    assert "a\\x1b[31m" in out


def tables_of(markdown: str) -> dict[str, list[list[str]]]:
    """The rows of the table under each heading, cells as text."""
    found: dict[str, list[list[str]]] = {}
    for section in markdown.split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        rows = [line for line in body.splitlines() if line.startswith("| ")]
        found[title] = [line.replace("\\|", "/").strip("| ").split(" | ") for line in rows]
    return found


def test_markdown_has_the_means_the_gap_and_every_task() -> None:
    evaluation = made_up(failed=True)
    text = evaluation_markdown(evaluation)
    tables = tables_of(text)
    assert all(len({len(row) for row in rows}) == 1 for rows in tables.values() if rows)
    mean = next(m for m in evaluation.means if (m.router, m.split) == ("arrow", "held_in"))
    row = next(row for row in tables["Means"] if row[1:3] == ["arrow", "held-in"])
    assert row[3] == f"**{100 * mean.mean:.1f}**"
    assert row[5].startswith("[")  # five tasks: an interval over tasks
    assert len(tables["Every task"]) == 2 + len(TASKS)
    gap = next(row for row in tables["Gap to the oracle"] if row[:2] == ["arrow", "held-in"])
    assert gap[3].endswith("%**")
    assert "norm on in0: a &lt;rule> \\| that must hold (found: another)" in text
    assert tables["Routing to the task's own expert"][2] == ["arrow", "40.0", "50.0", "20.0", "5"]


def test_markdown_of_two_libraries_names_them_and_counts_the_base_once() -> None:
    tables = tables_of(evaluation_markdown(made_up(["one", "two"])))
    head = tables["Every task"][0]
    assert head.count("base") == 1
    assert {"one: arrow", "two: arrow"} <= set(head)
    assert "two: arrow − one: arrow" in [row[0] for row in tables["Paired differences"]]
    assert {row[2] for row in tables["Every task"][2:]} == {"held-in", "mixed"}


@pytest.mark.parametrize("libraries", [["lib"], ["one", "two"]])
def test_the_terminal_shows_tasks_where_they_fit_and_means_else(
    libraries: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    print_evaluation(made_up(libraries))
    out = capsys.readouterr().out
    assert ("in3" in out) is (len(libraries) == 1)
    assert ("single tasks: --report" in out) is (len(libraries) == 2)
    assert "closes" in out
    assert "base guard: on" in out


def test_a_base_without_a_score_is_not_said_to_beat_no_router(capsys: pytest.CaptureFixture[str]) -> None:
    whole = made_up()
    found = ScoredCells([cell for cell in whole.cells if cell.router != "base"])
    evaluation = evaluation_of(found, whole.settings, whole.libraries, "tiny")
    print_evaluation(evaluation)
    out = capsys.readouterr().out + evaluation_markdown(evaluation)
    assert "base guard: the base has no score" in out
    assert "The base has no score." in out
    assert "beats no router" not in out
