"""Rows that nobody divided into splits, divided: a tenth to validate, a tenth to test, the others to train on."""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import replace

from lorary.data.schema import Row

# One prompt in so many is for validation, and as many are for the test.
PART = 10
# Fewer different prompts cannot be divided by three.
LEAST = 3


def divide(rows: Sequence[Row], where: str) -> list[Row]:
    """Give each row a split by the hash of its prompt, task by task; rows of one prompt stay together.

    Fewer than three different prompts of a task are all for training. Else a warning gives the numbers, since nobody
    asked for them.

    Args:
        rows: in any order, which stays.
        where: what the rows come from, for the warning.
    """
    by_task: dict[str, dict[str, str]] = {}
    for row in rows:
        by_task.setdefault(row.task, {})[row.source] = "train"
    for splits in by_task.values():
        order = sorted(splits, key=lambda source: hashlib.sha256(source.encode()).digest())
        number = max(1, round(len(order) / PART)) if len(order) >= LEAST else 0
        splits.update(dict.fromkeys(order[:number], "test") | dict.fromkeys(order[number : 2 * number], "val"))
    divided = [replace(row, split=by_task[row.task][row.source]) for row in rows]
    counts = {split: sum(row.split == split for row in divided) for split in ("train", "val", "test")}
    if counts["train"] < len(rows):
        numbers = ", ".join(f"{count} {split}" for split, count in counts.items())
        rule = "nothing says a split, so rows are divided by a hash of their prompts"
        warnings.warn(f"{where}: {rule}: {numbers}", stacklevel=2)
    return divided
