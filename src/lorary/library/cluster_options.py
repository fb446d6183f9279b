"""How the adapters of a library are grouped: the options of `lorary cluster`."""

from dataclasses import dataclass
from typing import Literal

from lorary.errors import UsageError
from lorary.flags import flag
from lorary.numbers import check_count, check_seed

AUTO = "auto"


def parse_k(text: str) -> int | str:
    """A number of clusters from the command line; `auto` stays as it is.

    Raises:
        UsageError: if it is neither.
    """
    if text == AUTO:
        return text
    try:
        return int(text)
    except ValueError:
        raise UsageError("--k must be a whole number or auto", found=text) from None


@dataclass(frozen=True)
class ClusterOptions:
    """How adapters are grouped.

    Args:
        k: number of clusters, or `auto`.
        method: how adapters are compared: `delta`, `paper-2024`, or `sketch` for many thousands.
        seed: seed of k-means, and of the random parts of the method.

    Raises:
        UsageError: if a value is out of range.
    """

    k: int | Literal["auto"] = flag(AUTO, metavar="N|auto", parse=parse_k)
    method: str = "delta"
    seed: int = 42

    def __post_init__(self) -> None:
        if self.k != AUTO:
            check_count("--k", self.k)
        check_seed("--seed", self.seed, most=2**32 - 1)  # of scikit-learn
