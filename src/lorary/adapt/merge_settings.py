"""How several adapters of a library become one: the options of `lorary merge`."""

from collections.abc import Mapping
from dataclasses import dataclass

from lorary.errors import UsageError
from lorary.flags import check_flags, flag
from lorary.numbers import is_number, shown

MEAN, CONCAT, FACTORS, TIES = "mean", "concat", "mu", "ties"
MERGES = (MEAN, CONCAT, FACTORS, TIES)


def parse_weights(text: str) -> dict[str, float]:
    """Weights by name from the command line, `a=1,b=-0.5`.

    Raises:
        UsageError: if the text is something else, or names an adapter twice.
    """
    try:
        pairs = [part.rsplit("=", 1) for part in text.split(",")]
        weights = {name.strip(): float(weight) for name, weight in pairs}
    except ValueError:
        raise UsageError("--weights must give NAME=W, separated by commas", found=text) from None
    if len(weights) < len(pairs):
        raise UsageError("--weights must name each adapter once", found=text)
    return weights


@dataclass(frozen=True)
class MergeSettings:
    """How adapters are merged.

    Args:
        method: `mean` or `concat` (the mean or the sum of the updates), `mu` (the mean of the factors) or `ties`.
        experts: adapters to merge, separated by commas; all but results of adaptations by default.
        weights: adapters with a weight each, in place of equal ones; not for `ties`, and for `mu` of one sign.
        rank: truncate to this rank, and say what that leaves out.

    Raises:
        UsageError: if a value is out of range, or values contradict each other.
    """

    method: str = flag(MEAN, choices=MERGES)
    experts: tuple[str, ...] | None = None
    weights: Mapping[str, float] | None = flag(None, metavar="NAME=W,...", parse=parse_weights)
    rank: int | None = flag(None, above=0)

    def __post_init__(self) -> None:
        # Imported here: it brings torch, which the help of a command does without.
        from lorary.route.setting import MOST_WEIGHT

        check_flags(self)
        if self.weights is None:
            return
        if self.method == TIES or self.experts is not None:
            raise UsageError("--weights names the adapters itself, and TIES has none",
                             found="--experts or --method ties")  # fmt: skip
        for name, weight in self.weights.items():
            if not (is_number(weight) and abs(weight) <= MOST_WEIGHT):
                raise UsageError(f"--weights must be numbers, {MOST_WEIGHT:g} at most", found=f"{name}={shown(weight)}")
        if self.method == FACTORS and len({weight > 0 for weight in self.weights.values() if weight}) > 1:
            raise UsageError(
                "--weights of mu must be of one sign: a sum of factors cannot take an update away",
                found=", ".join(f"{name}={weight:g}" for name, weight in self.weights.items()),
                remedy="use --method mean, which sums updates",
            )

    @property
    def names(self) -> tuple[str, ...] | None:
        """The adapters that are named; None for all."""
        return self.experts if self.weights is None else tuple(self.weights)
