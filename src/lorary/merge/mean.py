"""The mean of adapters, brought to a rank: what a task begins with that nobody was trained on."""

from collections.abc import Sequence

import torch

from lorary.merge.factors import have_one_rank, sum_factors
from lorary.merge.layers import Modules, mixed_layers
from lorary.merge.outputs import sum_updates
from lorary.merge.truncate import Truncated, truncate


def mean_of(adapters: Sequence[Modules], mix: str | None, rank: int | None) -> Truncated:
    """The mean of adapters: of their factors, as the paper's µ, or of their updates, brought to a rank.

    Args:
        adapters: factors by path, of each.
        mix: `factors` or `outputs`; None sums factors where ranks agree, and updates where they do not.
        rank: the largest to keep; where None, that of the largest of the adapters.

    Returns:
        Factors by path, and what truncation left out.
    """
    largest = max(factors.rank for modules in adapters for factors in modules.values())
    if len(adapters) == 1:
        modules = dict(adapters[0])
    else:
        equal = {
            path: torch.full((len(layer.members),), 1.0 / len(adapters), dtype=torch.float64)
            for path, layer in mixed_layers(adapters).items()
        }
        are_factors = mix == "factors" or (mix is None and have_one_rank(adapters))
        modules = sum_factors(adapters, equal) if are_factors else sum_updates(adapters, equal)
    scaling = next(iter(adapters[0].values())).scaling
    return truncate(modules, largest if rank is None else rank, scaling)
