"""The questions of a study, answered from its columns: numbers with intervals, and the words that follow from them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lorary.evaluate.compare import Columns, Difference, GapClosed, Rows
from lorary.report.markup import counted, enumerated
from lorary.study.config import SPLITS, split_name
from lorary.study.question import Question

WORDS = {"ahead": "ahead of", "behind": "behind", "level": "level with"}


@dataclass(frozen=True)
class StudyColumn:
    """One library under one router on one split.

    Args:
        library: of the study.
        router: as the study writes it.
        split: `held_in` or `held_out`, or one named set of these: `held_out: SET`.
        values: of the primary metric, one per test row, by task.
        stage: that scored it.
        questions: metric and hash of the data, by task: columns are compared on tasks where these are the same.
        failed: tasks that could not be scored.
        left_out: tasks that are not among `values`, since a column of the split failed on them.
    """

    library: str
    router: str
    split: str
    values: Rows
    stage: str
    questions: Mapping[str, tuple[str, str]]
    failed: Sequence[str] = ()
    left_out: Sequence[str] = ()

    @property
    def cell(self) -> str:
        """Its name in a question."""
        return f"{self.library}/{self.router}"


@dataclass(frozen=True)
class QuestionAnswer:
    """An answer.

    Args:
        ask: the question.
        lines: in words, each true by its numbers.
        rows: the numbers.
        unfinished: cells that are not scored yet.
    """

    ask: str
    lines: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    unfinished: Sequence[str]


def answer(
    question: Question,
    columns: Sequence[StudyColumn],
    drift: Mapping[str, Mapping[str, Any]],
    owed: Collection[tuple[str, str]],
) -> QuestionAnswer:
    """QuestionAnswer a question as far as its cells are scored.

    Args:
        question: of the study.
        columns: all there are.
        drift: what each drift stage found, by its name.
        owed: (cell, split) of all that the study scores once it is done.
    """
    scored = {(column.cell, column.split): column for column in columns}
    sets = dict.fromkeys(column.split for column in columns if column.split not in SPLITS)
    rows, lines, missing = [], [], set()
    for cell, against in question.comparisons():
        missing |= _unscored(scored, owed, cell, against)
        for split in (*SPLITS, *sets):
            column, other = scored.get((cell, split)), scored.get((against, split))
            if not (column and other):
                continue
            alike, tasks = _alike(column, other)
            if tasks:
                compared = alike.difference(0, 1, tasks)
                rows.append({"cell": cell, "against": against, "split": split, **asdict(compared),
                             "stages": _stages(column, other)})  # fmt: skip
                lines += [compared_line(cell, against, split, compared)] if split in SPLITS else []
    for cell in question.cells:
        if question.share_of is not None:
            _add_gaps(cell, question.share_of, scored, rows, lines)
            missing |= _unscored(scored, owed, cell, question.share_of)
        if question.base_wins:
            _add_base_wins(cell, scored, rows, lines)
            missing |= _unscored(scored, owed, cell)
    if len(question.cells) > 1 and question.against is not None:
        lines += _highest([*question.cells, question.against], scored)
    if question.drift is not None:
        measured = drift.get(question.drift)
        missing |= {f"drift:{question.drift}"} if measured is None else set()
        if measured is not None:
            rows.append({**measured, "stages": [f"drift:{question.drift}"]})
            lines += _drift_lines(measured)
    return QuestionAnswer(question.ask, list(dict.fromkeys(lines)), rows, sorted(missing))


def compared_line(cell: str, against: str, split: str, compared: Difference) -> str:
    """A comparison in words."""
    over_rows = f"95 % interval {points(compared.low)} to {points(compared.high)}, p {p_words(compared.p_rows)}"
    return (
        f"{cell} is {WORDS[compared.verdict]} {against} on {split_name(split)} tasks: "
        f"{points(compared.difference)} points ({over_rows}; {_size(compared)})"
        f"{_over_tasks(compared)}"
    )


def _over_tasks(compared: Difference) -> str:
    """Whether a claim about these tasks may be one about others like them."""
    if compared.verdict == "level" or compared.tasks_low is None or compared.tasks_high is None:
        return ""
    interval = f"{points(compared.tasks_low)} to {points(compared.tasks_high)}, p {p_words(compared.p_tasks)}"
    word = "and so it is over tasks" if compared.is_wider else "but not surely over tasks"
    return f", {word} ({interval})"


def _size(comparison: Difference | GapClosed) -> str:
    return f"{counted(comparison.tasks, 'task')}, {counted(comparison.rows, 'row')}"


def points(value: float) -> str:
    """A difference of values in 0..1 as points of 100, with its sign."""
    return f"{100 * value:+.1f}"


def p_words(p: float) -> str:
    """A p-value; the smallest that so many random signs can show is a bound."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _highest(cells: Sequence[str], scored: Mapping[tuple[str, str], StudyColumn]) -> list[str]:
    """Which of several cells has the highest mean over the tasks of all; no claim that it is ahead of the next."""
    lines = []
    for split in SPLITS:
        present = [cell for cell in cells if (cell, split) in scored]
        alike, tasks = _alike(*(scored[cell, split] for cell in present))
        if tasks and len(present) > 1:
            means = {cell: alike.mean(number, tasks).mean for number, cell in enumerate(present)}
            best = [cell for cell, value in means.items() if value == max(means.values())]
            lines.append(f"the highest mean of these on {split_name(split)} tasks is that of {enumerated(best)}")
    return lines


def _alike(*columns: StudyColumn) -> tuple[Columns[int], list[str]]:
    """Several columns by number on the tasks, and the first rows of each, that were asked of all of them; the tasks."""
    questions = columns[0].questions.items() if columns else ()
    tasks = [task for task, question in questions if all(other.questions.get(task) == question for other in columns)]
    rows = {task: min(len(column.values[task]) for column in columns) for task in tasks}
    values = {number: {task: column.values[task][: rows[task]] for task in tasks}
              for number, column in enumerate(columns)}  # fmt: skip
    return Columns(values), tasks


def _unscored(
    scored: Mapping[tuple[str, str], StudyColumn], owed: Collection[tuple[str, str]], *cells: str
) -> set[str]:
    """Cells that are not scored yet: the cell, or the splits and tasks that it lacks."""
    missing = set()
    for cell in cells:
        lacks = [split for split in SPLITS if (cell, split) in owed and (cell, split) not in scored]
        is_new = not any((cell, split) in scored for split in SPLITS)
        missing |= {cell} if is_new else {f"{cell} {split_name(split)}" for split in lacks}
        present = [column for split in SPLITS if (column := scored.get((cell, split)))]
        missing |= {f"{cell} on {task}" for column in present for task in column.failed}
    return missing


def _stages(*columns: StudyColumn) -> list[str]:
    return sorted({column.stage for column in columns})


def _base_of(cell: str, scored: Mapping[tuple[str, str], StudyColumn], split: str) -> StudyColumn | None:
    """The base as it was scored for the cell's library: in the template that validation rows chose, task by task."""
    return scored.get((f"{cell.split('/')[0]}/base", split))


def _add_gaps(
    cell: str, whole: str, scored: Mapping[tuple[str, str], StudyColumn], rows: list[dict[str, Any]], lines: list[str]
) -> None:
    for split in SPLITS:
        column, other, base = scored.get((cell, split)), scored.get((whole, split)), _base_of(cell, scored, split)
        if not (column and other and base):
            continue
        alike, tasks = _alike(column, other, base)
        if not tasks:
            continue
        gap, name = alike.gap_closed(0, 1, 2, tasks), split_name(split)
        rows.append({"cell": cell, "gap_to": whole, "split": split, **asdict(gap), "stages": _stages(column, other)})
        if gap.closed is None or gap.low is None or gap.high is None:
            statement = f"{whole} gains nothing over the base on {name} tasks that its rows could show"
            lines.append(f"{statement}: there is no gap to close ({points(gap.gap)} points; {_size(gap)})")
            continue
        lines.append(
            f"{cell} closes {100 * gap.closed:.0f} % of the gap from the base to {whole} on {name} tasks "
            f"(95 % interval {100 * gap.low:.0f} to {100 * gap.high:.0f} %; {points(gap.gain)} of "
            f"{points(gap.gap)} points; {_size(gap)})"
        )


def _add_base_wins(
    cell: str, scored: Mapping[tuple[str, str], StudyColumn], rows: list[dict[str, Any]], lines: list[str]
) -> None:
    for split in SPLITS:
        column, base = scored.get((cell, split)), _base_of(cell, scored, split)
        if not (column and base):
            continue
        alike, tasks = _alike(column, base)
        by_task = {task: alike.difference(0, 1, [task]) for task in tasks}
        lower = sorted(task for task, compared in by_task.items() if compared.difference < 0)
        surely = sorted(task for task, compared in by_task.items() if compared.verdict == "behind")
        rows.append({"cell": cell, "split": split, "tasks": len(by_task), "base_higher": lower, "base_ahead": surely,
                     "stages": _stages(column, base)})  # fmt: skip
        lines.append(_base_wins_line(cell, f"{counted(len(tasks), f'{split_name(split)} task')}", lower, surely))


def _base_wins_line(cell: str, tasks: str, lower: Sequence[str], surely: Sequence[str]) -> str:
    if not lower:
        return f"of {tasks}, the base scores higher than {cell} on none"
    clearly = f"clearly on {enumerated(surely)}" if surely else "on none of them clearly"
    return f"of {tasks}, the base scores higher than {cell} on {len(lower)}, {clearly}"


def _drift_lines(drift: Mapping[str, Any]) -> list[str]:
    kinds = ", ".join(f"{kind} {value:.2f}" for kind, value in drift["by_module"].items())
    pair = f"{drift['library']} and {drift['against']}"
    lines = [
        f"Arrow's prototypes of {pair} have a mean |cosine| of {drift['cosine']:.2f} over {len(drift['experts'])} "
        f"experts ({kinds})"
    ]
    if drift["clusters"] is not None:
        clusters = drift["clusters"]
        lines.append(
            f"their {clusters['k']} clusters agree with an adjusted Rand index of {clusters['adjusted_rand']:.2f}"
        )
    return lines
