"""A study's report for readers: the same tables as Markdown and as sections of a page."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lorary.evaluate.cells import is_base
from lorary.report.markup import left_out_words, markdown_text, text
from lorary.study.answers import p_words
from lorary.study.config import SPLITS, split_name

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
LISTED_TASKS = re.compile(r" --tasks (\S+,\S+) ")
VERDICTS = {"ahead": "up", "behind": "down", "level": "even"}


def markdown(document: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    parts = [f"# Study {document['study']}", document["about"], f"Command: `{document['command']}`"]
    if document["unfinished"]:
        parts += ["## Unfinished", _markdown_table(unfinished_table(document))]
    if document["failures"]:
        parts += ["## Cells that could not be scored", _markdown_table(failure_table(document))]
        parts.append(markdown_text(_left_out(document)))
    parts.append("## Answers")
    for answer in document["answers"]:
        lines = [f"- {line}" for line in [*answer["lines"], *_not_yet(answer)]]
        parts += [f"### {answer['ask']}", "\n".join(lines)]
        if "difference" in next(iter(answer["rows"]), {}):
            parts.append(_markdown_table(comparison_table(answer["rows"])))
    parts += ["## Libraries by routers", NOTE, _markdown_table(column_table(document))]
    parts += ["## What libraries were trained on", _markdown_table(library_table(document))]
    parts += ["\n".join(f"- {line.strip()}" for line in document["overlap"])]
    parts += ["## Stages and their commands", f"`TASKS={names}`" if (names := common_tasks(document)) else ""]
    parts += [_markdown_table(stage_table(document))]
    parts += ["## Environment", _markdown_table(environment_table(document))]
    return "\n\n".join(part for part in parts if part) + "\n"


NOTE = (
    "Mean of the tasks' primary metrics, in points of 100, with 95 % bootstrap intervals over test rows. `base` is "
    "the base in the template, plain or its own chat template, that was chosen on validation rows of each task; the "
    "lines `base (plain)` and `base (chat)` have one template throughout."
)

HEAT_NOTE = (
    '<p class="note">Points of 100 that each cell gains over the base, in the template chosen on validation rows.</p>'
)
# What is said above a picture, by its kind.
PICTURES = {
    "sweep": "Means over tasks with 95 % intervals over rows. Dotted: the base; dashed: the oracle.",
    "differences": "Thick: 95 % interval over rows; thin: over tasks. Filled: ahead or behind; open: level.",
    "gaps": "Gap closed: 0 is the base, with 95 % intervals over rows.",
    "drift": "Mean |cosine| of Arrow's prototypes by the depth of the layer.",
}


def html_sections(document: Mapping[str, Any], plots: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The report as sections of a page: identifier, title and HTML of each."""
    answers = _answers(document, plots["answers"])
    sections = [("answers", "Answers", f'<p class="lead">{text(document["about"])}</p>{answers}')]
    if document["unfinished"]:
        sections.append(("unfinished", "Unfinished", _html_table(unfinished_table(document))))
    if document["failures"]:
        failed = _html_table(failure_table(document)) + _note(_left_out(document))
        sections.append(("failures", "Cells that could not be scored", failed))
    note = f'<p class="note">{text(NOTE.replace("`", ""))}</p>'
    shared = "".join(f'<p class="note">{text(line)}</p>' for line in document["overlap"])
    overview = _plot("columns", "Means of libraries by routers") if plots["columns"] else ""
    heat = (
        [("heat", "Every task", HEAT_NOTE + _plot("heat", "Gain over the base by task", "plot scroll"))]
        if plots["heat"]
        else []
    )
    names = common_tasks(document)
    named = f'<p class="note"><code>TASKS={text(names)}</code></p>' if names else ""
    return [
        *sections,
        ("table", "Libraries by routers", note + overview + _html_table(column_table(document), "numbers")),
        *heat,
        ("libraries", "What libraries were trained on", _html_table(library_table(document), "numbers") + shared),
        ("stages", "Stages and their commands", named + _html_table(stage_table(document))),
        ("environment", "Environment", _html_table(environment_table(document))),
    ]


def _left_out(document: Mapping[str, Any]) -> str:
    return left_out_words([(f"{row['task']}, {split_name(row['split'])}", row["cell"]) for row in document["left_out"]])


def _note(line: str) -> str:
    return f'<p class="note">{text(line)}.</p>' if line else ""


def _plot(name: str, label: str, kind: str = "plot") -> str:
    return f'<div class="{kind}" id="plot-{name}" role="img" aria-label="{text(label)}"></div>'


def _answers(document: Mapping[str, Any], plots: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    parts = []
    for i, (answer, drawn) in enumerate(zip(document["answers"], plots, strict=True)):
        items = "".join(f"<li>{text(line)}.</li>" for line in answer["lines"])
        owed = "".join(f'<p class="note">{text(line)}</p>' for line in _not_yet(answer))
        table = ""
        if "difference" in next(iter(answer["rows"]), {}):
            numbers = _html_table(comparison_table(answer["rows"]), "numbers")
            table = f"<details{'' if drawn else ' open'}><summary>numbers</summary>{numbers}</details>"
        pictures = "".join(
            f'<p class="note">{PICTURES[picture["kind"]]}</p>{_plot(f"answer-{i}-{j}", answer["ask"])}'
            for j, picture in enumerate(drawn)
        )
        parts.append(f"<h3>{text(answer['ask'])}</h3>{f'<ul>{items}</ul>' if items else ''}{pictures}{table}{owed}")
    return "".join(parts)


def _not_yet(answer: Mapping[str, Any]) -> list[str]:
    return [f"unfinished: {', '.join(answer['unfinished'])}"] if answer["unfinished"] else []


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Paired differences."""
    head = ("cell", "against", "split", "points", "95 % over rows", "p", "95 % over tasks", "p over tasks", "tasks",
            "rows", "verdict", "from")  # fmt: skip
    body = [
        (row["cell"], row["against"], split_name(row["split"]), f"{100 * row['difference']:+.1f}",
         f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}", p_words(row["p_rows"]), _over_tasks(row),
         p_words(row["p_tasks"]), str(row["tasks"]), str(row["rows"]),
         row["verdict"], ", ".join(row["stages"]))
        for row in rows if "difference" in row
    ]  # fmt: skip
    return head, body


def _over_tasks(row: Mapping[str, Any]) -> str:
    if row["tasks_low"] is None:
        return "too few tasks"
    return f"{100 * row['tasks_low']:+.1f} to {100 * row['tasks_high']:+.1f}"


def column_table(document: Mapping[str, Any]) -> Table:
    """One line per library and router, one column per split."""
    columns = {(row["library"], row["router"], row["split"]): row for row in document["columns"]}
    lines = list(dict.fromkeys((library, router) for library, router, _ in columns))
    splits = dict.fromkeys([*SPLITS, *(split for _, _, split in columns)])
    head = ["library", "router", *(f"{split_name(split)} (tasks, rows)" for split in splits), "from"]
    body, bases = [], list[set[tuple[Any, ...]]]()
    for library, router in lines:
        rows = [columns.get((library, router, split)) for split in splits]
        if is_base(router):
            # The base is the same beside every library, on the same tasks.
            base_figures = {(router, row["split"], row["value"], row["tasks"], row["rows"]) for row in rows if row}
            if any(base_figures <= other for other in bases):
                continue
            bases.append(base_figures)
        stages = sorted({row["stage"] for row in rows if row})
        body.append((library, router, *map(_mean, rows), ", ".join(stages)))
    return head, body


def _mean(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    interval = f"{100 * row['low']:.1f}–{100 * row['high']:.1f}"
    return f"{100 * row['value']:.1f} [{interval}] ({row['tasks']}, {row['rows']})"


def library_table(document: Mapping[str, Any]) -> Table:
    """What was spent on each library."""
    head = ("library", "method", "tasks", "experts", "ranks", "steps", "training examples", "parameters", "from")
    body = [
        (row["library"], row["method"], str(row["tasks"]), str(row["experts"]), ", ".join(map(str, row["ranks"])),
         f"{row['steps']:,}", f"{row['examples']:,}", f"{row['parameters']:,}", row["stage"])
        for row in document["libraries"]
    ]  # fmt: skip
    return head, body


def common_tasks(document: Mapping[str, Any]) -> str:
    """The list of tasks that several plain commands name, so that tables need to say it once; empty without one."""
    plain = [row["plain"] for row in document["stages"] if row["plain"]]
    named = Counter(listed[1] for command in plain if (listed := LISTED_TASKS.search(command)))
    ((names, times),) = named.most_common(1) or [("", 0)]
    return names if times > 1 else ""


def stage_table(document: Mapping[str, Any]) -> Table:
    """How each stage stands, and what makes it, with `$TASKS` for `common_tasks`."""
    head = ("stage", "state", "seconds", "result", "command")
    body, names = [], common_tasks(document)
    for row in document["stages"]:
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        result = row["error"].replace("\n", "; ") or row["note"]
        plain = (row["plain"] or "").replace(f"--tasks {names} ", "--tasks $TASKS ")
        made_by = row["command"] + (f" (the same as: {plain})" if plain else "")
        body.append((row["stage"], row["state"], seconds, result, made_by))
    return head, body


def unfinished_table(document: Mapping[str, Any]) -> Table:
    """What is owed."""
    rows = [(row["stage"], row["state"], ", ".join(row["columns"])) for row in document["unfinished"]]
    return ("stage", "state", "columns that are not scored"), rows


def failure_table(document: Mapping[str, Any]) -> Table:
    """Cells that could not be scored."""
    rows = [(f"{row['library']}/{row['router']}", row["task"], f"{row['rule']} (found: {row['found']})", row["stage"])
            for row in document["failures"]]  # fmt: skip
    return ("cell", "task", "why", "from"), rows


def environment_table(document: Mapping[str, Any]) -> Table:
    """Machine and versions."""
    return ("what", "which"), list(document["environment"].items())


def _markdown_table(table: Table) -> str:
    head, body = table
    if not body:
        return "Nothing yet."
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(map(markdown_text, line)) + " |" for line in lines)


def _html_table(table: Table, kind: str = "") -> str:
    head, body = table
    if not body:
        return '<p class="note">Nothing yet.</p>'
    heads = "".join(f'<th scope="col">{text(cell)}</th>' for cell in head)
    rows = "".join(f"<tr>{''.join(map(_html_cell, line))}</tr>" for line in body)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _html_cell(cell: str) -> str:
    if cell in VERDICTS:
        return f'<td><span class="verdict {VERDICTS[cell]}">{cell}</span></td>'
    return f"<td>{text(cell)}</td>"
