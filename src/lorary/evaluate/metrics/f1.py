"""Token F1, as SQuAD scores answers."""

from collections import Counter
from collections.abc import Sequence

from lorary.evaluate.metrics.exact import normalise
from lorary.evaluate.metrics.metric import AnswerMetric

_ARTICLES = frozenset(("a", "an", "the"))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Largest harmonic mean of precision and recall of words over the references.

    Words are normalised as SQuAD does it: lower case, no punctuation, no English articles. Where nothing is left of
    one side, the score is 1 if nothing is left of the other either. Source: arXiv 1606.05250, and 1806.03822 for
    empty answers.

    >>> token_f1("The red house.", ["a red door"])
    0.5
    """
    return max(_f1(_words(answer), _words(reference)) for reference in references)


def _words(text: str) -> list[str]:
    return [word for word in normalise(text).split() if word not in _ARTICLES]


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    common = (Counter(answer) & Counter(reference)).total()
    return 2 * common / (len(answer) + len(reference))


F1 = AnswerMetric("f1", "f1", compare=token_f1)
