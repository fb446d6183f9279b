"""An evaluation as CSV, one line a cell, and as a page of Markdown."""

import csv
import io
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import fields

from lorary.evaluate.cells import BASE, Cell, Column, columns_of, grouped_tasks, primary_cells
from lorary.evaluate.evaluation import Evaluation
from lorary.evaluate.summary import Comparison
from lorary.report.markup import left_out_words
from lorary.report.markup import markdown_text as md

# Signs with which a cell of a spreadsheet begins to be a formula.
FORMULA = ("=", "+", "-", "@")
READING = (
    "Values are means over tasks, in points of 100. Round brackets hold the 95 % interval had other rows of these "
    "tasks been drawn, square brackets had other tasks been drawn; p-values are those of paired sign-flip tests, over "
    "rows and over tasks. The interval of a difference leaves 0 out exactly where its p-value is below 0.05."
)


def evaluation_csv(evaluation: Evaluation) -> str:
    """The cells as CSV with a head; a failed cell has no line."""
    keys = [field.name for field in fields(Cell) if field.name != "values"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(keys)
    for cell in evaluation.cells:
        writer.writerow([_plain(getattr(cell, key)) for key in keys])
    return file.getvalue()


def _plain(value: object) -> object:
    """A value in a line of its own; a text that a spreadsheet would take for a formula stays a text.

    Some pass over what cannot be seen before the sign, and some take its wide forms for it.
    """
    if not isinstance(value, str):
        return value
    first = next((char for char in value if not char.isspace() and char.isprintable()), "")
    is_formula = unicodedata.normalize("NFKC", first)[:1] in FORMULA or value[:1] in ("\t", "\r", "\n")
    return ("'" if value and is_formula else "") + value.replace("\r", " ")


def evaluation_markdown(evaluation: Evaluation) -> str:
    """Means, differences to the base, the gap to the oracle, routing, base guard, failures, and every task."""
    several = len(evaluation.libraries) > 1
    parts = [f"# {md(evaluation.library)}", f"Base model {md(evaluation.base)}. {READING}"]
    for title, body in (
        ("Means", _means(evaluation)),
        ("Paired differences", _differences(evaluation, several=several)),
        ("Gap to the oracle", _gaps(evaluation, several=several)),
        ("Routing to the task's own expert", _routing(evaluation, several=several)),
        ("Base guard", _guard(evaluation, several=several)),
        ("Failed cells", _failures(evaluation, several=several)),
        ("Every task", _tasks(evaluation, several=several)),
    ):
        if body:
            parts.append(f"## {title}\n\n" + "\n".join(body))
    return "\n\n".join(parts) + "\n"


def _means(evaluation: Evaluation) -> list[str]:
    rows = [
        [m.library, m.router, _words(m.split), f"**{_points(m.mean)}**", *_intervals(m), str(m.tasks)]
        for m in evaluation.means
    ]
    return _table(["library", "router", "split", "mean", "rows", "tasks", "number of tasks"], rows)


def _differences(evaluation: Evaluation, *, several: bool) -> list[str]:
    shown = [c for c in evaluation.comparisons if c.against == BASE or c.against_library != c.library]
    rows = [
        [_who(c, several=several), _words(c.split), f"**{_signed(c.difference)}**", *_intervals(c, sign=True),
         f"{c.p_rows:.2g}", f"{c.p_tasks:.2g}", str(c.tasks), c.verdict]
        for c in shown
    ]  # fmt: skip
    return _table(["difference", "split", "points", "rows", "tasks", "p rows", "p tasks", "number of tasks",
                   "verdict over rows"], rows)  # fmt: skip


def _who(c: Comparison, *, several: bool) -> str:
    one, other = (
        Column(library, router).label(several=several)
        for library, router in ((c.library, c.router), (c.against_library, c.against))
    )
    return f"{one} − {other}"


def _gaps(evaluation: Evaluation, *, several: bool) -> list[str]:
    rows = []
    for gap in evaluation.oracle_gaps:
        who = [Column(gap.library, gap.router).label(several=several), _words(gap.split), _signed(gap.gap)]
        closed = "no gap" if gap.closed is None else f"**{_points(gap.closed, 0)} %**"
        rows.append([*who, closed, *_intervals(gap), str(gap.tasks)])
    return _table(["router", "split", "oracle − base", "gap closed", "rows", "tasks", "number of tasks"], rows)


def _routing(evaluation: Evaluation, *, several: bool) -> list[str]:
    rows = [
        [
            Column(m.library, m.router).label(several=several),
            _points(m.share),
            _points(m.top1),
            _points(m.chance),
            str(m.tasks),
        ]
        for m in evaluation.routing_means
        if m.family is None
    ]
    return _table(["router", "share of weight", "is the strongest", "chance", "number of tasks"], rows)


def _guard(evaluation: Evaluation, *, several: bool) -> list[str]:
    if not evaluation.base_guard:
        is_scored = any(cell.router == BASE for cell in evaluation.cells)
        return ["The base beats no router on any task." if is_scored else "The base has no score."]
    return [
        f"- {md(e['task'])}, {_words(e['split'])}: base {_points(e['base'])}, "
        f"{md(Column(e['library'], e['router']).label(several=several))} {_points(e['value'])}"
        for e in evaluation.base_guard
    ]


def _failures(evaluation: Evaluation, *, several: bool) -> list[str]:
    lines = [
        f"- {md(Column(f.library, f.router).label(several=several))} on {md(f.task)}: {md(f.rule)}"
        + (f" (found: {md(f.found)})" if f.found else "")
        for f in evaluation.failures
    ]
    left_out = left_out_words(evaluation.left_out_pairs())
    return [*lines, *(["", f"{md(left_out)}."] if left_out else [])]


def _tasks(evaluation: Evaluation, *, several: bool) -> list[str]:
    primary, columns = primary_cells(evaluation.cells), columns_of(evaluation.cells)
    rows = []
    for split, tasks in grouped_tasks(evaluation.cells).items():
        for task in tasks:
            cells = [primary.get((column, task)) for column in columns]
            first = next(cell for cell in cells if cell is not None)
            shown = [_points(cell.value) if cell else "–" for cell in cells]
            rows.append([task, first.family, _words(split), f"{first.metric}, {first.n}", *shown])
    return _table(["task", "family", "split", "metric, rows", *(c.label(several=several) for c in columns)], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of Markdown; nothing where it would have no row."""
    if not rows:
        return []
    lines: Iterator[Sequence[str]] = iter([head, ["---"] * len(head), *rows])
    return ["| " + " | ".join(cell if cell == "---" else md(cell) for cell in line) + " |" for line in lines]


def _intervals(found: object, *, sign: bool = False) -> tuple[str, str]:
    shown = _signed if sign else _points
    rows, tasks = ([getattr(found, f"{kind}{end}") for end in ("low", "high")] for kind in ("", "tasks_"))
    return (
        "–" if None in rows else f"({shown(rows[0])}, {shown(rows[1])})",
        "–" if None in tasks else f"[{shown(tasks[0])}, {shown(tasks[1])}]",
    )


def _points(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}"


def _words(split: str) -> str:
    return split.replace("_", "-")
