"""Cells that earlier evaluations left in a library's results: what they say of single experts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorary.evaluate.cache import stored_values
from lorary.evaluate.cells import BASE, ORACLE
from lorary.evaluate.recorded_tasks import experts_by_task
from lorary.library.store import Library


@dataclass(frozen=True)
class RecordedScore:
    """One expert alone on one task, as the last evaluation of both recorded it.

    Args:
        task: name of the task.
        metric: what the values are.
        value: of the expert, 0..1.
        base: of the base model on the same task under the same metric; None where none is recorded.
        n: rows that the expert was scored on.
    """

    task: str
    metric: str
    value: float
    base: float | None
    n: int


def recorded_scores(library: Library, described: Sequence[Mapping[str, Any]]) -> dict[str, list[RecordedScore]]:
    """The scores of single experts in a library's results, by the expert's name and in the order of their tasks.

    The oracle scores the expert of a task alone, and `experts[NAME]` the one that is named. Results are found by hashes
    when they are used again, and do not say which version of an expert they scored: these are the last ones under its
    name.

    Args:
        library: the library.
        described: its experts, as `Library.describe` gives them.

    Raises:
        LibraryError: if results are there and cannot be read.
    """
    alone = {f"experts[{row['name']}]": str(row["name"]) for row in described}
    own = experts_by_task(described)
    bases: dict[tuple[str, str], float] = {}
    found: dict[str, dict[tuple[str, str], tuple[float, int]]] = {}
    for _, value in stored_values(library):
        for cell in value if isinstance(value, list) else ():
            if not _is_score(cell):
                continue
            key = (cell["task"], cell["metric"])
            name = own.get(cell["task"]) if cell["router"] == ORACLE else alone.get(cell["router"])
            if cell["router"] == BASE:
                bases[key] = float(cell["value"])
            elif name is not None:
                found.setdefault(name, {})[key] = (float(cell["value"]), cell["n"])
    return {
        name: [RecordedScore(*key, value, bases.get(key), n) for key, (value, n) in sorted(scores.items())]
        for name, scores in sorted(found.items())
    }


def _is_score(cell: Any) -> bool:
    """Whether this is the cell of a task that counts; the file may be anybody's."""
    if not isinstance(cell, Mapping) or cell.get("primary") is not True:
        return False
    texts, value, n = [cell.get(key) for key in ("task", "metric", "router")], cell.get("value"), cell.get("n")
    is_value = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
    is_count = isinstance(n, int) and not isinstance(n, bool)
    return is_value and is_count and all(isinstance(text, str) for text in texts)
