"""Perplexity: reported beside every metric, never what counts."""

from math import exp


def perplexity(mean_loss: float) -> float:
    """The exponential of nats per token: as if so many tokens had been equally likely.

    Over rows it is taken of their mean loss, so that it is the geometric mean of theirs: a single row that the model
    finds absurd would otherwise be all that is seen.

    >>> perplexity(0.0)
    1.0
    """
    return exp(min(mean_loss, 700.0))  # the largest exponent that a float holds, nearly
