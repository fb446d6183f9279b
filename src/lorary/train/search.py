"""A search over weights without gradients: CMA-ES within bounds, deterministic, resumed by repeating what it knows.

LoraHub (2307.13269) searches with nevergrad; CMA-ES is what its optimiser chooses at these sizes. Source of the
algorithm: the package `cma`.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from lorary.errors import MissingExtraError

# LoraHub's bounds, and where the search begins: at no adapter at all, a third of the way from the bounds.
BOUND = 1.5
STEP = 0.5


class WeightSearch:
    """Asks for candidates, generation by generation, and is told their values.

    Args:
        num_weights: at least 1.
        budget: candidates at most; one generation at least is asked for.
        seed: decides all candidates, together with the values told.

    Raises:
        MissingExtraError: if the package `cma` is not installed.
    """

    def __init__(self, num_weights: int, budget: int, seed: int) -> None:
        self.num_weights = num_weights
        # The algorithm needs two dimensions: a single weight has a neighbour that nobody looks at.
        dimensions = max(2, num_weights)
        self.size = min(budget, 4 + math.floor(3 * math.log(dimensions))) if budget > 1 else 2
        self.num_generations = max(1, budget // self.size)
        self._search = _cma_strategy(dimensions, self.size, seed)
        self._candidates: list[np.ndarray] = []

    def ask(self) -> list[list[float]]:
        """The candidates of the next generation, each (num_weights,) within the bounds."""
        self._candidates = self._search.ask()
        return [candidate[: self.num_weights].tolist() for candidate in self._candidates]

    def tell(self, values: Sequence[float]) -> None:
        """Say what the candidates asked for last are worth; lower is better."""
        self._search.tell(self._candidates, list(values))


def _cma_strategy(dimensions: int, size: int, seed: int) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it misses matplotlib, for plots that nobody asks for
            cma = import_module("cma")
    except ImportError as error:
        raise MissingExtraError("cma", "lorahub") from error
    generator = np.random.default_rng(seed)
    draw: Callable[..., np.ndarray] = lambda *shape: generator.standard_normal(shape)  # noqa: E731
    options = {"bounds": [-BOUND, BOUND], "popsize": size, "seed": math.nan, "verbose": -9, "randn": draw}
    return cma.CMAEvolutionStrategy(np.zeros(dimensions), STEP, options)
