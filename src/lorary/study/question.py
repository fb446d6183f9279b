"""What a study asks of its numbers."""

from dataclasses import dataclass

from lorary.errors import UsageError
from lorary.route import ROUTERS
from lorary.route.spec import EXPERTS, REFERENCES, parse_spec


def _one_way(cell: str) -> str:
    """A cell with its router the one way to write it; a method of an adaptation is no router, and stays."""
    library, _, router = cell.partition("/")
    is_router = router.partition("[")[0] in (*ROUTERS, *REFERENCES, EXPERTS)
    return f"{library}/{parse_spec(router).label}" if is_router else cell


@dataclass(frozen=True)
class Question:
    """What the study asks of its numbers. A cell is `LIBRARY/ROUTER`.

    Args:
        ask: the question, in words.
        cells: to compare with `against`, or to take the share of a gain of, or to hold against the base.
        against: a cell.
        pairs: further comparisons, (cell, against).
        share_of: the cell whose gain over the base is the whole.
        base_wins: name the tasks on which the base is ahead of each cell.
        drift: a drift stage whose numbers are the answer.
    """

    ask: str
    cells: tuple[str, ...] = ()
    against: str | None = None
    pairs: tuple[tuple[str, ...], ...] = ()
    share_of: str | None = None
    base_wins: bool = False
    drift: str | None = None

    def __post_init__(self) -> None:
        if unpaired := [pair for pair in self.pairs if len(pair) != 2]:
            raise UsageError(f"a pair of question '{self.ask}' must be two cells", found=list(unpaired[0]))
        for key in ("against", "share_of"):
            object.__setattr__(self, key, None if getattr(self, key) is None else _one_way(getattr(self, key)))
        object.__setattr__(self, "cells", tuple(map(_one_way, self.cells)))
        object.__setattr__(self, "pairs", tuple(tuple(map(_one_way, pair)) for pair in self.pairs))
        named = [*self.cells, *(cell for pair in self.pairs for cell in pair), self.against, self.share_of]
        if wrong := [cell for cell in named if cell is not None and "/" not in cell]:
            raise UsageError(f"a cell of question '{self.ask}' must be LIBRARY/ROUTER", found=wrong[0])
        has_query = self.pairs or self.drift or (self.cells and (self.against or self.share_of or self.base_wins))
        if not has_query:
            raise UsageError(
                f"question '{self.ask}' must say what it asks",
                found="neither pairs nor drift, nor cells with against, share_of or base_wins",
                remedy="see docs/reproduce.md",
            )

    def comparisons(self) -> list[tuple[str, str]]:
        """Every (cell, against)."""
        first = [(cell, self.against) for cell in self.cells if self.against is not None and cell != self.against]
        return [*first, *((pair[0], pair[1]) for pair in self.pairs)]
