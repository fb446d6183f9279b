"""Agreement between clusterings."""

from collections.abc import Sequence
from typing import NamedTuple

from lorary.errors import ShapeError


class ClusterAgreement(NamedTuple):
    """How well two clusterings agree.

    Args:
        adjusted_rand: adjusted Rand index: 1 for the same, 0 on average for chance.
        mutual_information: normalised mutual information (arithmetic mean), in [0, 1]; not corrected for chance.
    """

    adjusted_rand: float
    mutual_information: float


def agreement(first: Sequence[int | str], second: Sequence[int | str]) -> ClusterAgreement:
    """Compare two clusterings of the same adapters; how clusters are named plays no part.

    Args:
        first: label of each adapter, such as its cluster.
        second: label of each adapter in another clustering, such as the family of its task.

    Raises:
        ShapeError: if they are not over the same adapters.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score  # take a second to import

    if len(first) != len(second):
        raise ShapeError(
            "both clusterings must be of the same adapters", found=f"{len(first)} and {len(second)} labels"
        )
    return ClusterAgreement(
        float(adjusted_rand_score(first, second)), float(normalized_mutual_info_score(first, second))
    )
