"""Results as tables in the terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lorary.recipes.evaluate import Evaluation


def print_evaluation(evaluation: Evaluation) -> None:
    """Print the primary metric of every router and task, the paired differences, and where the base wins.

    Args:
        evaluation: the cells and comparisons.
    """
    console = Console(width=None if Console().is_terminal else 120)
    primary = {(cell.router, cell.task): cell for cell in evaluation.cells if cell.primary}
    routers = list(dict.fromkeys(router for router, _ in primary))
    for split in ("held_in", "held_out"):
        tasks = list(dict.fromkeys(cell.task for cell in primary.values() if cell.split == split))
        if not tasks:
            continue
        table = Table(title=f"{split.replace('_', '-')} tasks", title_justify="left")
        table.add_column("task")
        table.add_column("metric")
        table.add_column("rows", justify="right")
        for router in routers:
            table.add_column(router, justify="right")
        for task in tasks:
            cells = [primary.get((router, task)) for router in routers]
            known = [cell for cell in cells if cell is not None]
            best = max(cell.value for cell in known)
            shown = [_value(cell.value, cell.value == best) if cell else "" for cell in cells]
            table.add_row(escape(task), known[0].metric, str(known[0].n), *shown)
        means = [evaluation.mean(router, split) for router in routers]
        table.add_section()
        table.add_row("mean", "", "", *(f"{mean:.3f}" if mean is not None else "" for mean in means))
        console.print(table)
    for c in evaluation.comparisons:
        interval = f"95 % interval {c.low:+.3f} to {c.high:+.3f}, {c.tasks} tasks"
        split = c.split.replace("_", "-")
        console.print(f"{split}: {c.router} - {c.against} = {c.difference:+.3f} ({interval})", highlight=False)
    if not evaluation.base_guard:
        console.print("base guard: the base beats no router on any task")
    for entry in evaluation.base_guard:
        console.print(
            f"base guard: on {entry['task']} ({entry['split'].replace('_', '-')}) the base ({entry['base']:.3f}) "
            f"beats {entry['router']} ({entry['value']:.3f})",
            highlight=False,
            markup=False,
        )


def _value(value: float, is_best: bool) -> str:
    return f"[bold]{value:.3f}[/bold]" if is_best else f"{value:.3f}"
