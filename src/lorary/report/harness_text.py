"""Results of lm-evaluation-harness as a table in the terminal."""

from rich.markup import escape
from rich.table import Table

from lorary.display import table_console
from lorary.evaluate.harness_library import HarnessResult


def print_harness(result: HarnessResult) -> None:
    """Print every metric of every task, a column for each router, and where the base wins.

    Args:
        result: the cells.
    """
    console = table_console()
    routers = list(dict.fromkeys(cell.router for cell in result.cells))
    by_row: dict[tuple[str, str, str], dict[str, str]] = {}
    sizes: dict[tuple[str, str, str], tuple[int, int]] = {}
    for cell in result.cells:
        row = (cell.task, cell.metric, cell.filter)
        shown = f"{cell.value:.4f}" + (f" ± {cell.stderr:.4f}" if cell.stderr is not None else "")
        by_row.setdefault(row, {})[cell.router] = f"[bold]{shown}[/bold]" if cell.primary else shown
        sizes[row] = (cell.n, cell.shots)
    table = Table(title=f"lm-evaluation-harness on library {escape(result.library)}", title_justify="left")
    for name in ("task", "metric", "filter"):
        table.add_column(name)
    for name in ("rows", "shots", *map(escape, routers)):
        table.add_column(name, justify="right")
    for row, values in by_row.items():
        table.add_row(*map(escape, row), *map(str, sizes[row]), *(values.get(router, "") for router in routers))
    console.print(table)
    for entry in result.guard:
        console.print(
            f"base guard: on {entry['task']} the base ({entry['base']:.3f}) beats {entry['router']} "
            f"({entry['value']:.3f})",
            highlight=False,
            markup=False,
        )
