"""Results as tables in the terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from lorary.display import table_console
from lorary.evaluate.cells import Cell, Column, columns_of, grouped_tasks, primary_cells
from lorary.evaluate.evaluation import Evaluation
from lorary.evaluate.harness_cells import HarnessResult
from lorary.evaluate.summary import Comparison, Mean
from lorary.report.export import guard_line, label, split_words
from lorary.report.markup import by_name_words, counted, left_out_words, template_words
from lorary.report.table_model import is_told

# With more columns than these, no single tasks are printed, nor comparisons of two routers inside a library.
MOST_COLUMNS = 6


def text_table(title: str, *heads: str, caption: str | None = None) -> Table:
    """An empty table.

    Args:
        title: above it, markup of rich.
        heads: of the columns, each after `<` for text to the left or `>` for numbers to the right.
        caption: below it.
    """
    table = Table(title=title, title_justify="left", caption=caption)
    for head in heads:
        # Long names are folded, never cut.
        table.add_column(escape(head[1:]), justify="right" if head[0] == ">" else "left", overflow="fold")
    return table


def print_evaluation(evaluation: Evaluation) -> None:
    """Print the primary metric of every router and task, the paired differences, and where the base wins.

    Args:
        evaluation: the cells and comparisons.
    """
    console = table_console()
    columns = columns_of(evaluation.cells)
    few = len(columns) <= MOST_COLUMNS
    for table in _task_tables(evaluation, columns) if few else [_means_table(evaluation)]:
        console.print(table)
    if not few:
        console.print("single tasks: --report, --markdown or --csv", highlight=False)
    for line in _lines(evaluation, few=few):
        console.print(line, highlight=False, markup=False)


def _task_tables(evaluation: Evaluation, columns: list[Column]) -> Iterator[Table]:
    """A table for each split: a row for each task, a column for each router."""
    primary = primary_cells(evaluation.cells)
    heads = ("<task", "<metric", ">rows", *(f">{label(evaluation, *column)}" for column in columns))
    for split, tasks in grouped_tasks(evaluation.cells).items():
        table = text_table(f"{split_words(split)} tasks", *heads)
        for task in tasks:
            _add_task(table, task, primary, columns)
        table.add_section()
        means = [_mean(evaluation, column, split) for column in columns]
        counts = sorted({mean.tasks for mean in means if mean})
        shown = [f"{mean.mean:.3f}" if mean else "-" for mean in means]
        table.add_row(f"mean of {' or '.join(map(str, counts))}", "", "", *shown)
        yield table


def _means_table(evaluation: Evaluation) -> Table:
    """A row for each router, its means over the tasks of each split."""
    title, heads = "means over tasks, with 95 % intervals over rows", ("<library", "<router", "<split")
    table = text_table(title, *heads, ">mean", ">interval", ">tasks")
    for m in evaluation.means:
        names = (escape(m.library), escape(m.router), split_words(m.split))
        table.add_row(*names, f"{m.mean:.3f}", f"{m.low:.3f} to {m.high:.3f}", str(m.tasks))
    return table


def _add_task(table: Table, task: str, primary: Mapping[tuple[Column, str], Cell], columns: list[Column]) -> None:
    cells = [primary.get((column, task)) for column in columns]
    scored = [cell for cell in cells if cell is not None]
    # The oracle is told the task, and where all score alike nothing is best.
    rivals = {cell.value for cell in scored if not is_told(cell.router)}
    best = max(rivals) if len(rivals) > 1 else None
    shown = [_value(cell.value, not is_told(cell.router) and cell.value == best) if cell else "-" for cell in cells]
    table.add_row(escape(task), scored[0].metric, str(scored[0].n), *shown)


def _mean(evaluation: Evaluation, column: Column, split: str) -> Mean | None:
    """The mean of a column, the base's beside the first library that has the split."""
    means = (m for m in evaluation.means if (m.router, m.split) == (column.router, split))
    return next((m for m in means if column.library in (None, m.library)), None)


def _value(value: float, is_best: bool) -> str:
    return f"[bold]{value:.3f}[/bold]" if is_best else f"{value:.3f}"


def _lines(evaluation: Evaluation, *, few: bool) -> list[str]:
    shown = [c for c in evaluation.comparisons if few or c.against_library != c.library]
    lines = [_compared(evaluation, comparison) for comparison in shown]
    if left_out := len(evaluation.comparisons) - len(shown):
        lines.append(f"({left_out} more comparisons of two routers are in --json)")
    for gap in evaluation.oracle_gaps:
        name = f"{split_words(gap.split)}: {label(evaluation, gap.library, gap.router)}"
        if gap.closed is None:
            lines.append(f"{name}: no gap to close, the oracle is {gap.gap:+.3f} from the base")
        else:
            lines.append(
                f"{name} closes {100 * gap.closed:.0f} % of the gap of {gap.gap:.3f} from the base to the oracle"
            )
    lines += template_words(*(list(map(vars, each)) for each in (evaluation.base_templates, evaluation.means)))
    lines += filter(None, [left_out_words(evaluation.left_out_pairs()), by_name_words(evaluation.tasks_by_name)])
    if not evaluation.base_guard:
        lines.append(f"base guard: {guard_line(evaluation)}")
    for entry in evaluation.base_guard:
        name = label(evaluation, entry["library"], entry["router"])
        lines.append(_base_wins({**entry, "router": name}, f" ({split_words(entry['split'])})"))
    return lines


def _base_wins(entry: Mapping[str, Any], split: str) -> str:
    task, base, value = entry["task"], entry["base"], entry["value"]
    return f"base guard: on {task}{split} the base ({base:.3f}) beats {entry['router']} ({value:.3f})"


def _compared(evaluation: Evaluation, c: Comparison) -> str:
    router = label(evaluation, c.library, c.router)
    against = label(evaluation, c.against_library, c.against)
    interval = f"95 % interval over rows {c.low:+.3f} to {c.high:+.3f}, p {c.p_rows:.2g}"
    wider = "" if c.tasks_low is None else f"; over tasks {c.tasks_low:+.3f} to {c.tasks_high:+.3f}, p {c.p_tasks:.2g}"
    size = counted(c.tasks, "task")
    return (
        f"{split_words(c.split)}: {router} - {against} = {c.difference:+.3f} ({interval}{wider}; {size}): {c.verdict}"
    )


def print_harness(result: HarnessResult) -> None:
    """Print every metric of every task of lm-evaluation-harness, a column for each router, and where the base wins.

    Args:
        result: the cells.
    """
    console = table_console()
    routers = list(dict.fromkeys(cell.router for cell in result.cells))
    values: dict[tuple[str, str, str], dict[str, str]] = {}
    sizes: dict[tuple[str, str, str], tuple[int, int]] = {}
    for cell in result.cells:
        question = (cell.task, cell.metric, cell.filter)
        shown = f"{cell.value:.4f}" + (f" ± {cell.stderr:.4f}" if cell.stderr is not None else "")
        values.setdefault(question, {})[cell.router] = f"[bold]{shown}[/bold]" if cell.primary else shown
        sizes[question] = (cell.n, cell.shots)
    heads = ("<task", "<metric", "<filter", ">rows", ">shots", *(f">{router}" for router in routers))
    table = text_table(f"lm-evaluation-harness on library {escape(result.library)}", *heads)
    for question, by_router in values.items():
        shown_values = (by_router.get(router, "") for router in routers)
        table.add_row(*map(escape, question), *map(str, sizes[question]), *shown_values)
    console.print(table)
    for entry in result.guard:
        console.print(_base_wins(entry, ""), highlight=False, markup=False)
