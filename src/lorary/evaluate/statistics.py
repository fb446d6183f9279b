"""Bootstrap confidence intervals over rows."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000


def bootstrap_interval(values: Sequence[float], seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean.

    Args:
        values: one per row.
        seed: of the resampling.
        level: confidence level.

    Returns:
        Low and high end.
    """
    return stratified_interval([values], seed, level)


def stratified_interval(groups: Sequence[Sequence[float]], seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean of group means; rows are resampled inside their group.

    For a difference between two routers, the values are the row by row differences (a paired interval) and the groups
    the tasks.

    Args:
        groups: for each task, one value per row.
        seed: of the resampling.
        level: confidence level.

    Returns:
        Low and high end.
    """
    random = np.random.default_rng(seed)
    means = np.zeros(RESAMPLES)
    for group in groups:
        values = np.asarray(group, dtype=np.float64)
        drawn = random.integers(0, len(values), size=(RESAMPLES, len(values)))
        means += values[drawn].mean(axis=1) / len(groups)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
