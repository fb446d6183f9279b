"""Retrieval: the experts whose own prompts are most like the request."""

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize


def retrieval_scores(
    features: Float[Tensor, "batch features"], means: Float[Tensor, "experts features"]
) -> Float[Tensor, "batch experts"]:
    """Cosine of a prompt's vector with the mean vector of a few prompts of each expert.

    Source: LoraRetriever (arXiv 2402.09997), LoRAuter (2601.21795).

    Args:
        features: one vector for each prompt.
        means: of each expert.

    Returns:
        Cosines.
    """
    return normalize(features, dim=-1) @ normalize(means, dim=-1).mT
