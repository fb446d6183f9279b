"""What a task begins with: one adapter, or the mean of several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lorary.merge.mean import mean_of
from lorary.recipes.adapt_pool import Pool
from lorary.train.units import Factors


@dataclass(frozen=True)
class Start:
    """Factors to begin with.

    Args:
        modules: by path.
        parents: content hash of each adapter they were made of, by name.
        error: what truncation left out of them, relative, in the Frobenius norm.
    """

    modules: Factors = field(repr=False)
    parents: Mapping[str, str]
    error: float = 0.0


def start_of(pool: Pool, names: Sequence[str], mix: str | None, rank: int | None) -> Start:
    """The mean of some adapters of a pool; one alone as it is.

    Args:
        pool: the adapters.
        names: those to take the mean of, at least one.
        mix: `factors` or `outputs`; None sums factors where ranks agree, and updates where they do not.
        rank: the largest to keep; where None, that of the largest of the adapters.
    """
    adapters = [pool.get(name) for name in names]
    made = mean_of(adapters, mix, rank)
    return Start(made.modules, pool.hashes_of(names), made.error)
