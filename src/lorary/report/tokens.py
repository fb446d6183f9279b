"""Tokens as pages show them: visible text, the colour of an expert, and the experts of a token in words."""

from collections.abc import Sequence

# Experts named beside a token or a layer.
NUM_NAMED = 3
# Experts with a colour of their own; grey is for all others.
NUM_COLOURS = 7


def colour_of(rank: int) -> str:
    """The colour of an expert as CSS, by its rank in usage."""
    return f"var(--hue-{min(rank, NUM_COLOURS)})"


def visible(token: str) -> str:
    r"""The text of a token with its white space to be seen; an empty token too.

    >>> visible("a\n"), visible("")
    ('a↵', '∅')
    """
    return token.replace("\n", "↵").replace("\t", "⇥") or "∅"


def named_weights(experts: Sequence[str], weights: Sequence[float]) -> str:
    """The experts of the largest weights, with these.

    >>> named_weights(["a", "b", "c"], [0.25, 0.0, 0.75])
    'c 0.75, a 0.25'
    """
    order = sorted((i for i, weight in enumerate(weights) if weight > 0), key=lambda i: -weights[i])[:NUM_NAMED]
    return ", ".join(f"{experts[i]} {weights[i]:.2f}" for i in order) or "no expert"
