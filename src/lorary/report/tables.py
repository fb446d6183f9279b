"""Results as tables in the terminal."""

from collections.abc import Iterator, Mapping

from rich.markup import escape
from rich.table import Table

from lorary.display import table_console
from lorary.evaluate.cells import BASE, ORACLE, Cell, Column, columns_of, grouped_tasks, primary_cells
from lorary.evaluate.evaluation import Evaluation
from lorary.evaluate.summary import Comparison, Mean
from lorary.report.markup import counted, left_out_words

# With more columns than these, no single tasks are printed, nor comparisons of two routers inside a library.
MOST_COLUMNS = 6


def print_evaluation(evaluation: Evaluation) -> None:
    """Print the primary metric of every router and task, the paired differences, and where the base wins.

    Args:
        evaluation: the cells and comparisons.
    """
    console = table_console()
    columns = columns_of(evaluation.cells)
    several, few = len(evaluation.libraries) > 1, len(columns) <= MOST_COLUMNS
    for table in _task_tables(evaluation, columns, several=several) if few else [_means_table(evaluation)]:
        console.print(table)
    if not few:
        console.print("single tasks: --report, --markdown or --csv", highlight=False)
    for line in _lines(evaluation, several=several, few=few):
        console.print(line, highlight=False, markup=False)


def _task_tables(evaluation: Evaluation, columns: list[Column], *, several: bool) -> Iterator[Table]:
    """A table for each split: a row for each task, a column for each router."""
    primary = primary_cells(evaluation.cells)
    for split, tasks in grouped_tasks(evaluation.cells).items():
        table = Table(title=f"{_words(split)} tasks", title_justify="left")
        # Long names are folded, never cut.
        table.add_column("task", overflow="fold")
        table.add_column("metric", overflow="fold")
        table.add_column("rows", justify="right")
        for column in columns:
            table.add_column(escape(column.label(several=several)), justify="right", overflow="fold")
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
    table = Table(title="means over tasks, with 95 % intervals over rows", title_justify="left")
    for name in ("library", "router", "split"):
        table.add_column(name, overflow="fold")
    for name in ("mean", "interval", "tasks"):
        table.add_column(name, justify="right")
    for m in evaluation.means:
        interval = f"{m.low:.3f} to {m.high:.3f}"
        table.add_row(escape(m.library), escape(m.router), _words(m.split), f"{m.mean:.3f}", interval, str(m.tasks))
    return table


def _add_task(table: Table, task: str, primary: Mapping[tuple[Column, str], Cell], columns: list[Column]) -> None:
    cells = [primary.get((column, task)) for column in columns]
    known = [cell for cell in cells if cell is not None]
    # The oracle is told the task, and where all score alike nothing is best.
    rivals = {cell.value for cell in known if cell.router != ORACLE}
    best = max(rivals) if len(rivals) > 1 else None
    shown = [_value(cell.value, cell.router != ORACLE and cell.value == best) if cell else "-" for cell in cells]
    table.add_row(escape(task), known[0].metric, str(known[0].n), *shown)


def _mean(evaluation: Evaluation, column: Column, split: str) -> Mean | None:
    """The mean of a column, the base's beside the first library that has the split."""
    means = (m for m in evaluation.means if (m.router, m.split) == (column.router, split))
    return next((m for m in means if column.library in (None, m.library)), None)


def _value(value: float, is_best: bool) -> str:
    return f"[bold]{value:.3f}[/bold]" if is_best else f"{value:.3f}"


def _words(split: str) -> str:
    return split.replace("_", "-")


def _lines(evaluation: Evaluation, *, several: bool, few: bool) -> list[str]:
    shown = [c for c in evaluation.comparisons if few or c.against_library != c.library]
    lines = [_compared(comparison, several=several) for comparison in shown]
    if left_out := len(evaluation.comparisons) - len(shown):
        lines.append(f"({left_out} more comparisons of two routers are in --json)")
    for gap in evaluation.oracle_gaps:
        who = f"{_words(gap.split)}: {Column(gap.library, gap.router).label(several=several)}"
        if gap.closed is None:
            lines.append(f"{who}: no gap to close, the oracle is {gap.gap:+.3f} from the base")
        else:
            lines.append(
                f"{who} closes {100 * gap.closed:.0f} % of the gap of {gap.gap:.3f} from the base to the oracle"
            )
    lines += filter(None, [left_out_words(evaluation.left_out_pairs())])
    if not evaluation.base_guard:
        is_scored = any(cell.router == BASE for cell in evaluation.cells)
        lines.append(f"base guard: {'the base beats no router on any task' if is_scored else 'the base has no score'}")
    for entry in evaluation.base_guard:
        router = Column(entry["library"], entry["router"]).label(several=several)
        lines.append(
            f"base guard: on {entry['task']} ({_words(entry['split'])}) the base ({entry['base']:.3f}) beats "
            f"{router} ({entry['value']:.3f})"
        )
    return lines


def _compared(c: Comparison, *, several: bool) -> str:
    one, other = Column(c.library, c.router).label(several=several), c.against
    if c.against != BASE:
        other = Column(c.against_library, c.against).label(several=several)
    interval = f"95 % interval over rows {c.low:+.3f} to {c.high:+.3f}, p {c.p_rows:.2g}"
    wider = "" if c.tasks_low is None else f"; over tasks {c.tasks_low:+.3f} to {c.tasks_high:+.3f}, p {c.p_tasks:.2g}"
    size = counted(c.tasks, "task")
    return f"{_words(c.split)}: {one} - {other} = {c.difference:+.3f} ({interval}{wider}; {size}): {c.verdict}"
