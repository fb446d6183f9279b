"""Intervals and p-values by resampling, over rows and over tasks. All draws follow from a seed and a task's name.

Two questions, never to be mixed up. *Over rows*: had other rows of these very tasks been drawn, how far would a number
move? *Over tasks*: had other tasks like these been drawn? The second is the wider one, and the one that a claim about
new tasks needs.
"""

import zlib
from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95
# Below so many tasks, an interval over tasks would pretend to a knowledge that nobody has.
FEWEST_TASKS = 5
# So many rows are drawn at once, of all resamples together.
MOST_DRAWN = 4_000_000
# Up to so many tasks, all patterns of signs are gone through.
MOST_EXACT = 12

Floats = NDArray[np.float64]
Interval = tuple[float, float]


def bootstrap_interval(values: Sequence[float], seed: int = 0, level: float = LEVEL) -> Interval:
    """Percentile bootstrap interval of a mean.

    Args:
        values: one per row.
        seed: of the resampling.
        level: confidence level.

    Returns:
        Low and high end.
    """
    return interval_of(resampled_means("", np.asarray(values, dtype=np.float64)[:, None], seed)[:, 0], level)


def interval_of(resampled: Floats, level: float = LEVEL) -> Interval:
    """The percentile interval of resampled values; rounding apart, equal ones give a point."""
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resampled_means(task: str, values: Floats, seed: int = 0) -> Floats:
    """Means of a task's rows drawn with replacement, the same draws for every column: any two columns stay paired.

    Args:
        task: its name; other tasks get other draws.
        values: (rows, columns).
        seed: of the resampling.

    Returns:
        (RESAMPLES, columns).
    """
    rows = len(values)
    random = np.random.default_rng([seed, rows, zlib.crc32(task.encode())])
    found = []
    for count in _chunks(rows):
        drawn = random.integers(0, rows, size=(count, rows)) + rows * np.arange(count)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=count * rows).reshape(count, rows)
        found.append(counts @ values / rows)
    return np.concatenate(found)


def _chunks(rows: int) -> list[int]:
    """How many resamples are drawn at once, so that memory does not grow with the rows."""
    count = max(1, min(RESAMPLES, MOST_DRAWN // rows))
    return [min(count, RESAMPLES - start) for start in range(0, RESAMPLES, count)]


def flipped_means(task: str, values: Floats, seed: int = 0) -> Floats:
    """Means of a task's rows after each row's sign was thrown like a coin, the same throws for every column.

    The difference of two columns is then a draw of their mean difference if, row by row, it were chance which of the
    two did better.

    Args:
        task: its name; other tasks get other throws.
        values: (rows, columns).
        seed: of the throws.

    Returns:
        (RESAMPLES, columns).
    """
    rows = len(values)
    random = np.random.default_rng([seed + 1, rows, zlib.crc32(task.encode())])
    thrown = (random.integers(0, 2, size=(count, rows), dtype=np.int8) for count in _chunks(rows))
    return np.concatenate([(2.0 * signs - 1.0) @ values / rows for signs in thrown])


def p_value(observed: float, drawn: Floats) -> float:
    """Two-sided p-value of a permutation test whose draws are a sample: never 0, the data are one draw themselves."""
    return float((1 + _as_extreme(observed, drawn)) / (1 + len(drawn)))


def tasks_p_value(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p-value of the mean over tasks, if for each task it were chance which side did better (sign flips).

    Exact up to `MOST_EXACT` tasks. With T tasks it cannot fall below 2 / 2^T.

    Args:
        differences: one per task.
        seed: of the throws where there are more tasks.
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) <= MOST_EXACT:
        signs = np.array(list(product((1.0, -1.0), repeat=len(values))))
        return float(_as_extreme(float(values.mean()), signs @ values / len(values)) / len(signs))
    return p_value(float(values.mean()), flipped_means("", values[:, None], seed)[:, 0])


def drawn_tasks(num_tasks: int, seed: int = 0) -> NDArray[np.int64] | None:
    """Tasks drawn with replacement, (RESAMPLES, tasks); None where there are too few to draw from."""
    if num_tasks < FEWEST_TASKS:
        return None
    return np.random.default_rng([seed + 2, num_tasks]).integers(0, num_tasks, size=(RESAMPLES, num_tasks))


def tasks_interval(values: Sequence[float], seed: int = 0) -> Interval | None:
    """Percentile bootstrap interval of a mean over tasks, whole tasks drawn; None with fewer than `FEWEST_TASKS`."""
    drawn = drawn_tasks(len(values), seed)
    return None if drawn is None else interval_of(np.asarray(values, dtype=np.float64)[drawn].mean(axis=1))


def _as_extreme(observed: float, drawn: Floats) -> int:
    """How many draws lie as far from zero as what was observed; sums in another order differ by a hair."""
    return int((np.abs(drawn) >= abs(observed) * (1 - 1e-9) - 1e-12).sum())
