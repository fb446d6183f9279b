"""Which tasks an adapter counts as trained on: those that are recorded, else the one that is called as it is."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any


def tasks_of(described: Mapping[str, Any]) -> list[str]:
    """The tasks of one adapter; its own name where none is recorded, as for most imported ones.

    Args:
        described: an entry of `Library.describe`.
    """
    return list(described["tasks"]) or [described["name"]]


def mapped_by_name(described: Sequence[Mapping[str, Any]], tasks: Collection[str]) -> list[str]:
    """Adapters that count as trained on a task by their names alone.

    Args:
        described: as `Library.describe` gives them.
        tasks: names of the tasks at hand.
    """
    return [row["name"] for row in described if not row["tasks"] and row["name"] in tasks]


def experts_by_task(described: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """For each task some expert was trained on, that expert; of several the one of fewest tasks.

    One that has only its name for it comes after those of which the task is recorded.

    Args:
        described: as `Library.describe` gives them.
    """
    by_task: dict[str, tuple[bool, int, str]] = {}
    for row in described:
        for task in tasks_of(row):
            candidate = (not row["tasks"], len(row["tasks"]), row["name"])
            by_task[task] = min(candidate, by_task.get(task, candidate))
    return {task: name for task, (*_, name) in by_task.items()}
