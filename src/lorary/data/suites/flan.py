"""Flan v2: the 256 tasks that the paper trains on, cut and split as its code does it."""

from collections.abc import Collection, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lorary.data.schema import Task
from lorary.data.suites.flan_names import FLAN_TASKS
from lorary.data.suites.public import Public, read_public, suite_task

__all__ = ["FLAN_TASKS", "load_flan"]

SOURCE = Public("chiayewken/flan-v2", "train")
MOST_ROWS = 10_000
SEED = 42
SCAN_ROWS = 100_000
_CLEAN = str.maketrans(":/-.", "____")


def load_flan(names: Collection[str], copies: Path | None) -> dict[str, Task]:
    """Load some of the 256 tasks, scored by ROUGE-L.

    The data set (23 million rows) is read once for the names of its tasks, and then for the rows that are taken.

    Args:
        names: some of `FLAN_TASKS`.
        copies: folder of copies of the data sets; the Hub is asked where None.

    Raises:
        TaskError: if the data set cannot be read, or lacks a task.
    """
    rows = read_public(SOURCE, ("source", "target", "task_name"), copies)
    places = _places(rows, names)
    return {
        name: suite_task(
            name, _records(rows, places[name]), SOURCE, family=FLAN_TASKS[name], metric="rougeL", role="train"
        )
        for name in sorted(names)
    }


def clean_name(name: str) -> str:
    """The name that the paper's code gives a task of the data set.

    >>> clean_name("glue/sst2:2.0.0")
    'glue_sst2_2_0_0'
    """
    return name.translate(_CLEAN)


def chosen_rows(num_rows: int) -> tuple[np.ndarray, list[str]]:
    """Which rows of a task are taken, in which order, and the split of each.

    As the paper's code: shuffled by `numpy.random.default_rng(42).permutation`, which is what `datasets` does with seed
    42; the first 10,000; the split of the i-th by the first number that `numpy.random.RandomState(i)` gives: below 0.8
    training, below 0.9 validation, else test; shuffled once more with the same seed.
    """
    sample = np.random.default_rng(SEED).permutation(num_rows)[:MOST_ROWS]
    shuffle = np.random.default_rng(SEED).permutation(len(sample))
    splits = _splits(len(sample))
    return sample[shuffle], [splits[i] for i in shuffle]


@lru_cache(maxsize=256)
def _splits(num_rows: int) -> list[str]:
    draws = [np.random.RandomState(i).rand() for i in range(num_rows)]
    return ["train" if draw < 0.8 else "val" if draw < 0.9 else "test" for draw in draws]


def _places(rows: Any, names: Collection[str]) -> dict[str, np.ndarray]:
    """Row numbers of each task."""
    row_numbers: dict[str, list[np.ndarray]] = {name: [] for name in names}
    raw = rows.select_columns(["task_name"]).with_format("arrow")
    for start, table in zip(range(0, len(rows), SCAN_ROWS), raw.iter(batch_size=SCAN_ROWS), strict=True):
        encoded = table.column("task_name").combine_chunks().dictionary_encode()
        codes = encoded.indices.to_numpy()
        for code, value in enumerate(encoded.dictionary.to_pylist()):
            if (name := clean_name(value)) in row_numbers:
                row_numbers[name].append(start + np.flatnonzero(codes == code))
    return {name: np.concatenate(parts) if parts else np.empty(0, np.int64) for name, parts in row_numbers.items()}


def _records(rows: Any, places: np.ndarray) -> Iterator[dict[str, Any]]:
    sample, splits = chosen_rows(len(places))
    for row, split in zip(rows.select(places[sample]), splits, strict=True):
        yield {"split": split, "source": row["source"], "target": row["target"]}
