"""Intervals and p-values by resampling, over rows and over tasks. All draws follow from a seed and a task's name.

A mean is not held against anything: its interval is a percentile bootstrap. A difference is tested by flipping signs,
and its interval is that test inverted, so that interval and p-value never disagree.

Two questions, never to be mixed up. *Over rows*: had other rows of these very tasks been drawn, how far would a number
move? *Over tasks*: had other tasks like these been drawn? The second is the wider one, and the one that a claim about
new tasks needs.
"""

import zlib
from collections.abc import Sequence
from itertools import product
from math import ceil
from typing import NamedTuple

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
# Sums in another order differ by less than this.
HAIR = 1e-9

Floats = NDArray[np.float64]
Interval = tuple[float, float]


def bootstrap_interval(values: Sequence[float], seed: int = 0, task: str = "") -> Interval:
    """Percentile bootstrap interval of a mean.

    Args:
        values: one per row.
        seed: of the resampling.
        task: name of the task, which the draws follow from too.

    Returns:
        Low and high end.
    """
    return interval_of(resampled_means(task, np.asarray(values, dtype=np.float64)[:, None], seed)[:, 0])


def interval_of(resampled: Floats) -> Interval:
    """The percentile interval of resampled values; rounding apart, equal ones give a point."""
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
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
    means = []
    for count in _chunks(rows):
        drawn = random.integers(0, rows, size=(count, rows)) + rows * np.arange(count)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=count * rows).reshape(count, rows)
        means.append(counts @ values / rows)
    return np.concatenate(means)


def _chunks(rows: int) -> list[int]:
    """How many resamples are drawn at once, so that memory does not grow with the rows."""
    count = max(1, min(RESAMPLES, MOST_DRAWN // rows))
    return [min(count, RESAMPLES - start) for start in range(0, RESAMPLES, count)]


def flipped_means(task: str, values: Floats, seed: int = 0) -> Floats:
    """Means of a task's rows after each row's sign was thrown like a coin, the same throws for every column.

    The difference of two columns is then a draw of their mean difference if, row by row, it were chance which of the
    two did better. Arguments and shape are those of `resampled_means`.
    """
    rows = len(values)
    random = np.random.default_rng([seed + 1, rows, zlib.crc32(task.encode())])
    thrown = (random.integers(0, 2, size=(count, rows), dtype=np.int8) for count in _chunks(rows))
    return np.concatenate([(2.0 * signs - 1.0) @ values / rows for signs in thrown])


class FlipTest(NamedTuple):
    """A sign-flip test of `value / unit`, and the interval that follows from it.

    Args:
        p: two-sided p-value of a ratio of 0.
        low: lower end of the interval: all ratios that the test does not reject. Infinite where it rejects none.
        high: its upper end.
    """

    p: float
    low: float
    high: float


def flip_test(value: float, unit: float, flipped: Floats, flipped_unit: Floats) -> FlipTest:
    """Test and interval out of the same flips, so that the interval leaves 0 out exactly where p is below 1 - LEVEL.

    A ratio x is tested by flipping the signs of what `value - x * unit` is the mean of: a throw is as extreme as the
    data where `|flipped - x * flipped_unit|` is at least `|value - x * unit|`. Those x are an interval around
    `value / unit`, whose two ends are found for each throw, so that no x needs to be searched for.

    Args:
        value: a mean difference.
        unit: what it is measured in: 1 for the difference itself, the gap for the part of a gap; above 0.
        flipped: (throws,) means after signs were thrown, the data themselves (no sign flipped) among them.
        flipped_unit: (throws,) the same throws of the unit.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        bounds = np.stack([(value - flipped) / (unit - flipped_unit), (value + flipped) / (unit + flipped_unit)])
    # A throw that leaves the unit as large as it is, is as extreme for every ratio.
    never = np.abs(flipped_unit) >= unit * (1 - HAIR)
    lows, highs = np.where(never, -np.inf, bounds.min(axis=0)), np.where(never, np.inf, bounds.max(axis=0))
    for exact in (0.0, value / unit):
        lows, highs = (np.where(np.abs(ends - exact) < HAIR, exact, ends) for ends in (lows, highs))
    # The smallest and largest ratio at which so many throws are as extreme that the test does not reject it.
    num_inside = ceil((1 - LEVEL) * len(flipped) - HAIR)
    return FlipTest(
        p=float(((lows <= 0) & (highs >= 0)).mean()),
        low=float(np.sort(lows)[num_inside - 1]),
        high=float(np.sort(highs)[-num_inside]),
    )


def flipped_tasks(values: Floats, seed: int = 0) -> Floats:
    """Means over tasks after each task's sign was thrown, all patterns of signs up to `MOST_EXACT` tasks.

    Args:
        values: (tasks, columns).
        seed: of the throws where there are more tasks.

    Returns:
        (throws, columns), the values as they are among them.
    """
    tasks = len(values)
    if tasks <= MOST_EXACT:
        return np.array(list(product((1.0, -1.0), repeat=tasks))) @ values / tasks
    return np.concatenate([flipped_means("", values, seed), values.mean(axis=0, keepdims=True)])


def tasks_interval(values: Sequence[float], seed: int = 0) -> Interval | None:
    """Percentile bootstrap interval of a mean over tasks, whole tasks drawn; None with fewer than `FEWEST_TASKS`."""
    tasks = len(values)
    if tasks < FEWEST_TASKS:
        return None
    drawn = np.random.default_rng([seed + 2, tasks]).integers(0, tasks, size=(RESAMPLES, tasks))
    return interval_of(np.asarray(values, dtype=np.float64)[drawn].mean(axis=1))
