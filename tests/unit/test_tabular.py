"""Tables of results: as text, as HTML that holds no foreign markup, as records."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from lorary.tabular import MOST_HTML_LINES, MOST_TEXT_LINES, ResultTable, Tabular


@dataclass(frozen=True, repr=False)
class Cups(Tabular):
    """Cups by name."""

    by_name: dict[str, float | None]

    def tables(self) -> Sequence[ResultTable]:
        return [ResultTable("cups", ("who", "how many"), list(self.by_name.items()))]

    def records(self) -> list[dict[str, Any]]:
        return [{"who": name, "cups": number} for name, number in self.by_name.items()]


def test_text_has_a_title_heads_and_numbers_to_the_right() -> None:
    assert repr(Cups({"a": 1.0, "bob": 12.25, "c": None})).splitlines() == [
        "cups",
        "who  how many",
        "a       1.000",
        "bob    12.250",
        "c           –",
    ]


def test_long_tables_and_long_cells_are_cut_and_say_so() -> None:
    text = repr(Cups({f"{'x' * 100}{i}": 1.0 for i in range(MOST_TEXT_LINES + 3)}))
    assert text.endswith("\n... 3 more lines: to_pandas() has all")
    assert max(map(len, text.splitlines())) < 80
    html = Cups({str(i): 1.0 for i in range(MOST_HTML_LINES + 1)})._repr_html_()
    assert html.count("<tr>") == MOST_HTML_LINES + 1
    assert "1 more lines" in html


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a\x1b[31mb", "a\nb"])
def test_no_name_becomes_markup_or_moves_the_cursor(name: str) -> None:
    cups = Cups({name: 1.0})
    html = cups._repr_html_()
    assert html.count("<") == html.count(">")
    assert "<script" not in html
    assert "<img" not in html
    for shown in (html, repr(cups)):
        assert "\x1b" not in shown
    assert len(repr(cups).splitlines()) == 3


def test_an_empty_table_has_its_heads() -> None:
    assert repr(Cups({})) == "cups\nwho  how many"
    assert "<th" in Cups({})._repr_html_()


@pytest.mark.skipif(importlib.util.find_spec("pandas") is None, reason="pandas is not installed")
def test_records_become_a_frame() -> None:
    frame = Cups({"a": 1.0, "b": None}).to_pandas()
    assert list(frame.columns) == ["who", "cups"]
    assert frame["cups"].isna().tolist() == [False, True]
