"""Task predictor (TP): a linear classifier that was taught which prompts are an expert's."""

from jaxtyping import Float
from torch import Tensor


def predictor_logits(
    features: Float[Tensor, "batch features"], coefficients: Float[Tensor, "experts coefficients"]
) -> Float[Tensor, "batch experts"]:
    """Logits of a prompt under each expert's class; their softmax is the probability that the prompt is its own.

    Paper: 2405.11157, task predictor; there, the classes are tasks.

    Args:
        features: one vector for each prompt.
        coefficients: for each expert its weights on the features, and its intercept behind them.

    Returns:
        Logits.
    """
    return features @ coefficients[:, :-1].mT + coefficients[:, -1]
