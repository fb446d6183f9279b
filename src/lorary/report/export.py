"""An evaluation as CSV, one line a cell, and as a page of Markdown."""

import csv
import io
import unicodedata
from collections.abc import Sequence
from dataclasses import fields

from lorary.evaluate.cells import BASE, OF_ROWS, Cell, Column, columns_of, grouped_tasks, primary_cells
from lorary.evaluate.evaluation import Evaluation
from lorary.report.markup import by_name_words, hundredths, left_out_words, template_words
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
    keys = [field.name for field in fields(Cell) if field.name not in OF_ROWS]
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
    by_name = by_name_words(evaluation.tasks_by_name)
    parts = [f"# {md(evaluation.library)}", f"Base model {md(evaluation.base)}. {READING}"]
    parts += [f"{md(by_name)}."] if by_name else []
    for title, body in (
        ("Means", _means(evaluation)),
        ("The base's template", _templates(evaluation)),
        ("Paired differences", _differences(evaluation)),
        ("Gap to the oracle", _gaps(evaluation)),
        ("Routing to the task's own expert", _routing(evaluation)),
        ("Base guard", _guard(evaluation)),
        ("Failed cells", _failures(evaluation)),
        ("Every task", _tasks(evaluation)),
    ):
        if body:
            parts.append(f"## {title}\n\n" + "\n".join(body))
    return "\n\n".join(parts) + "\n"


def label(evaluation: Evaluation, library: str | None, router: str) -> str:
    """What a column is called: by its library too where there are several, except the base, which is in all of them."""
    return Column(None if router == BASE else library, router).label(with_library=len(evaluation.libraries) > 1)


def split_words(split: str) -> str:
    """The name of a split in running text."""
    return split.replace("_", "-")


def guard_line(evaluation: Evaluation) -> str:
    """What is to be said where the base beats no router."""
    is_scored = any(cell.router == BASE for cell in evaluation.cells)
    return "the base beats no router on any task" if is_scored else "the base has no score"


def _means(evaluation: Evaluation) -> list[str]:
    lines = [
        [m.library, m.router, split_words(m.split), f"**{hundredths(m.mean)}**", *_intervals(m), str(m.tasks)]
        for m in evaluation.means
    ]
    return _table(["library", "router", "split", "mean", "rows", "tasks", "number of tasks"], lines)


def _templates(evaluation: Evaluation) -> list[str]:
    words = template_words(*(list(map(vars, entries)) for entries in (evaluation.base_templates, evaluation.means)))
    return [f"- {md(line)}." for line in words]


def _differences(evaluation: Evaluation) -> list[str]:
    shown = [c for c in evaluation.comparisons if c.against == BASE or c.against_library != c.library]
    lines = [
        [f"{label(evaluation, c.library, c.router)} − {label(evaluation, c.against_library, c.against)}",
         split_words(c.split), f"**{_signed(c.difference)}**", *_intervals(c, sign=True),
         f"{c.p_rows:.2g}", f"{c.p_tasks:.2g}", str(c.tasks), c.verdict]
        for c in shown
    ]  # fmt: skip
    return _table(["difference", "split", "points", "rows", "tasks", "p rows", "p tasks", "number of tasks",
                   "verdict over rows"], lines)  # fmt: skip


def _gaps(evaluation: Evaluation) -> list[str]:
    lines = []
    for gap in evaluation.oracle_gaps:
        names = [label(evaluation, gap.library, gap.router), split_words(gap.split), _signed(gap.gap)]
        closed = "no gap" if gap.closed is None else f"**{hundredths(gap.closed, 0)} %**"
        lines.append([*names, closed, *_intervals(gap), str(gap.tasks)])
    return _table(["router", "split", "oracle − base", "gap closed", "rows", "tasks", "number of tasks"], lines)


def _routing(evaluation: Evaluation) -> list[str]:
    lines = [
        [label(evaluation, m.library, m.router), *map(hundredths, (m.share, m.top1, m.chance)), str(m.tasks)]
        for m in evaluation.routing_means
        if m.family is None
    ]
    return _table(["router", "share of weight", "is the strongest", "chance", "number of tasks"], lines)


def _guard(evaluation: Evaluation) -> list[str]:
    if not evaluation.base_guard:
        return [f"{guard_line(evaluation).capitalize()}."]
    return [
        f"- {md(e['task'])}, {split_words(e['split'])}: base {hundredths(e['base'])}, "
        f"{md(label(evaluation, e['library'], e['router']))} {hundredths(e['value'])}"
        for e in evaluation.base_guard
    ]


def _failures(evaluation: Evaluation) -> list[str]:
    lines = [
        f"- {md(label(evaluation, f.library, f.router))} on {md(f.task)}: {md(f.rule)}"
        + (f" (found: {md(f.found)})" if f.found else "")
        for f in evaluation.failures
    ]
    left_out = left_out_words(evaluation.left_out_pairs())
    return [*lines, *(["", f"{md(left_out)}."] if left_out else [])]


def _tasks(evaluation: Evaluation) -> list[str]:
    primary, columns = primary_cells(evaluation.cells), columns_of(evaluation.cells)
    lines = []
    for split, tasks in grouped_tasks(evaluation.cells).items():
        for task in tasks:
            cells = [primary.get((column, task)) for column in columns]
            first = next(cell for cell in cells if cell is not None)
            shown = [hundredths(cell.value) if cell else "–" for cell in cells]
            lines.append([task, first.family, split_words(split), f"{first.metric}, {first.n}", *shown])
    names = (label(evaluation, *column) for column in columns)
    return _table(["task", "family", "split", "metric, rows", *names], lines)


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A table of Markdown; nothing where it would have no line."""
    if not lines:
        return []
    escaped = [map(md, heads), ["---"] * len(heads), *(map(md, line) for line in lines)]
    return [f"| {' | '.join(cells)} |" for cells in escaped]


def _intervals(result: object, *, sign: bool = False) -> tuple[str, str]:
    shown = _signed if sign else hundredths
    rows, tasks = ([getattr(result, f"{kind}{end}") for end in ("low", "high")] for kind in ("", "tasks_"))
    return (
        "–" if None in rows else f"({shown(rows[0])}, {shown(rows[1])})",
        "–" if None in tasks else f"[{shown(tasks[0])}, {shown(tasks[1])}]",
    )


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}"
