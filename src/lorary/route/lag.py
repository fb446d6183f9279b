"""LAG: Arrow narrows the library down, projection decides among the rest."""

from jaxtyping import Float
from torch import Tensor

from lorary.ops.choose import keep_top_k


def lag_readout(
    first: Float[Tensor, "tokens experts"], second: Float[Tensor, "tokens experts"], candidates: int
) -> Float[Tensor, "tokens experts"]:
    """The second stage's scores of each token's best candidates by the first stage, minus infinity elsewhere.

    One candidate is Arrow with top_k 1; as many as there are experts is projection. Source: LAG, arXiv 2507.05346.

    Args:
        first: scores of the first stage, minus infinity for experts that may not be chosen.
        second: scores of the second stage.
        candidates: how many pass the first stage, clamped to the number of experts.

    Returns:
        Scores.
    """
    return second.masked_fill(keep_top_k(first, candidates) == -float("inf"), -float("inf"))
