"""How several adapters of a library become one: the options of `lorary merge`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorary.errors import UsageError
from lorary.flags import check_flags, check_methods, flag, flags_of
from lorary.numbers import is_number, shown

MEAN, FACTORS, TIES_FACTORS = "mean", "mu", "ties-factors"
MERGES = (
    MEAN, "concat", FACTORS, "linear", TIES_FACTORS, "prune", "ties", "dare", "dare-ties", "core-ties", "tsv", "iso-c",
    "iso-cts", "pico",
)  # fmt: skip
# Where no weights are given, these take the mean of the adapters, and the others their sum.
MEANS = (MEAN, FACTORS, "linear", "prune", "dare", "pico")


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
        method: `mean` or `concat` (the mean or the sum of the updates), `ties`, `dare`, `dare-ties` or `prune` (entry
            by entry), `core-ties`, `tsv`, `iso-c`, `iso-cts` or `pico` (in the space they share), or `mu`, `linear` or
            `ties-factors` (on factors).
        experts: adapters to merge, separated by commas; all but results of adaptations by default.
        weights: adapters with a weight each, in place of equal ones; `mu` needs weights of one sign.
        scale: the merged update is multiplied by it.
        rank: truncate to this rank, and say what that leaves out of each layer.
        density: share of the entries of each update to keep.
        seed: of the entries that are drawn.
        common: share of the directions of the sum that stays; the others are directions of single experts.
        strength: how strongly shared output directions are shrunk; 0 is the mean.

    Raises:
        UsageError: if a value is out of range, or values contradict each other.
    """

    method: str = flag(MEAN, choices=MERGES)
    experts: tuple[str, ...] | None = None
    weights: Mapping[str, float] | None = flag(None, metavar="NAME=W,...", parse=parse_weights)
    scale: float = 1.0
    rank: int | None = flag(None, above=0)
    density: float = flag(
        0.2, above=0.0, most=1.0, methods=("ties", "core-ties", "dare", "dare-ties", "prune", TIES_FACTORS)
    )
    seed: int = flag(0, least=0, methods=("dare", "dare-ties"))
    common: float = flag(0.8, least=0.0, most=1.0, methods=("iso-cts",))
    strength: float = flag(1.0, least=0.0, most=4.0, methods=("pico",))

    def __post_init__(self) -> None:
        # Imported here: it brings torch, which the help of a command does without.
        from lorary.route.setting import MOST_WEIGHT

        check_flags(self)
        check_methods(self, self.method)
        if not (is_number(self.scale) and abs(self.scale) <= MOST_WEIGHT):
            raise UsageError(f"--scale must be a number, {MOST_WEIGHT:g} at most", found=shown(self.scale))
        if self.weights is None:
            return
        if self.experts is not None:
            raise UsageError("--weights names the adapters itself", found="--experts", remedy="leave it out")
        if self.method == TIES_FACTORS:
            raise UsageError(
                f"--method {TIES_FACTORS} has no weights", found="--weights", remedy="use --method ties, which has them"
            )
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

    @property
    def options(self) -> dict[str, Any]:
        """What the method takes beside weights and rank, by name."""
        return {
            name: getattr(self, name) for name, rules in flags_of(MergeSettings).items() if self.method in rules.methods
        }
