"""Exact match, strict and normalised."""

import string
from collections.abc import Sequence

from lorary.evaluate.metrics.metric import AnswerMetric

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(answer: str, references: Sequence[str]) -> float:
    r"""1 if the answer equals a reference; runs of white space count as one space, case counts.

    >>> exact_match(" Paris\n", ["Paris"])
    1.0
    """
    return float(" ".join(answer.split()) in {" ".join(reference.split()) for reference in references})


def normalised_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer equals a reference once both are normalised; what the paper's code does for BIG-Bench Hard.

    A reference of nothing but punctuation is compared as it is: normalised, every other such text would equal it.

    >>> normalised_match("(a).", ["(A)"])
    1.0
    >>> normalised_match("] ]", ["] )"])
    0.0
    """
    bare = normalise(answer)
    empty = [reference for reference in references if not normalise(reference)]
    return float(exact_match(answer, empty) or bare in {normalise(reference) for reference in references} - {""})


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation, runs of white space as one space."""
    return " ".join(text.lower().translate(_PUNCTUATION).split())


EM = AnswerMetric(
    "em",
    "exact match",
    "the share of rows whose generated answer equals a reference, white space aside",
    compare=exact_match,
)
EM_NORMALISED = AnswerMetric("em_normalised", "em_normalised", compare=normalised_match)
