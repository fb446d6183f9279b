"""Results that show themselves as tables: as text in a terminal, as HTML in a notebook, as a pandas DataFrame."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lorary.errors import MissingExtraError
from lorary.terminal import printable

# More fill a screen that nobody reads; `to_pandas` has all of them.
MOST_TEXT_LINES, MOST_HTML_LINES = 16, 200
# Characters of a cell of text.
MOST_CELL = 60
MISSING = "–"


@dataclass(frozen=True)
class ResultTable:
    """A small table.

    Args:
        title: what it shows.
        heads: of the columns.
        lines: the values of each line, one for each head: texts, numbers, or None where there is none.
    """

    title: str
    heads: Sequence[str]
    lines: Sequence[Sequence[object]]

    def to_text(self) -> str:
        """The table as lines of text: numbers to the right, long cells cut, the first lines alone."""
        shown = [[_cut(_text(value)) for value in line] for line in self.lines[:MOST_TEXT_LINES]]
        cells = [[_cut(printable(head)) for head in self.heads], *shown]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        numeric = [_is_numeric(column) for column in self._columns()]
        aligned = [
            "  ".join(
                cell.rjust(width) if is_number else cell.ljust(width)
                for cell, width, is_number in zip(line, widths, numeric, strict=True)
            ).rstrip()
            for line in cells
        ]
        return "\n".join([printable(self.title), *aligned, *_more(len(self.lines) - MOST_TEXT_LINES)])

    def to_html(self) -> str:
        """The table as HTML; no character of a value can become markup."""
        numeric = [_is_numeric(column) for column in self._columns()]
        align = [f' style="text-align:{"right" if is_number else "left"}"' for is_number in numeric]
        heads = "".join(f"<th{style}>{_html(head)}</th>" for head, style in zip(self.heads, align, strict=True))
        lines = [
            "<tr>" + "".join(f"<td{style}>{_html(value)}</td>" for value, style in zip(line, align, strict=True))
            for line in self.lines[:MOST_HTML_LINES]
        ]
        more = "".join(f"<p>{text}</p>" for text in _more(len(self.lines) - MOST_HTML_LINES))
        return (
            f"<table><caption>{_html(self.title)}</caption><thead><tr>{heads}</tr></thead>"
            f"<tbody>{'</tr>'.join([*lines, ''])}</tbody></table>{more}"
        )

    def _columns(self) -> list[Sequence[object]]:
        return [[line[i] for line in self.lines] for i in range(len(self.heads))]


class Tabular:
    """A result that shows itself as tables. A dataclass of this kind is declared with `repr=False`."""

    def tables(self) -> Sequence[ResultTable]:
        """What text and HTML show."""
        raise NotImplementedError

    def records(self) -> Sequence[Mapping[str, Any]]:
        """What `to_pandas` holds: one mapping for each line, all of the same keys."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return "\n\n".join(table.to_text() for table in self.tables())

    def _repr_html_(self) -> str:
        return "\n".join(table.to_html() for table in self.tables())

    def to_pandas(self) -> Any:
        """The records as a `pandas.DataFrame`, one line each."""
        return to_pandas(self.records())


def to_pandas(records: Sequence[Mapping[str, Any]]) -> Any:
    """Records as a `pandas.DataFrame`, one line each.

    Raises:
        MissingExtraError: if pandas is not installed.
    """
    try:
        import pandas  # `datasets` brings it
    except ModuleNotFoundError as error:
        raise MissingExtraError("pandas", "tables") from error

    return pandas.DataFrame(list(records))


def to_polars(records: Sequence[Mapping[str, Any]]) -> Any:
    """Records as a `polars.DataFrame`, one line each.

    Raises:
        MissingExtraError: if polars is not installed.
    """
    try:
        import polars
    except ModuleNotFoundError as error:
        raise MissingExtraError("polars", "tables") from error

    return polars.DataFrame(list(records), infer_schema_length=None)


def _text(value: object) -> str:
    """A value as people read it, on one line."""
    if value is None:
        return MISSING
    return f"{value:.3f}" if isinstance(value, float) else printable(" ".join(str(value).split()))


def _html(value: object) -> str:
    return escape(_text(value), quote=True)


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CELL else f"{text[: MOST_CELL - 1]}…"


def _is_numeric(column: Sequence[object]) -> bool:
    return any(isinstance(value, (int, float)) for value in column) and not any(
        isinstance(value, str) for value in column
    )


def _more(count: int) -> list[str]:
    return [f"... {count} more lines: to_pandas() has all"] if count > 0 else []
