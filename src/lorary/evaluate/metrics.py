"""Scores of one answer, in 0..1, higher is better."""

from collections.abc import Sequence
from typing import Any

from lorary.errors import MissingExtraError, TaskError

# Metrics that are read off log-likelihoods of the options, and those that need a generated answer.
CHOICE_METRICS = ("acc", "acc_raw")
TEXT_METRICS = ("em", "rougeL")


def check_metric(metric: str, task: str) -> None:
    """Refuse a metric that cannot be computed.

    Raises:
        TaskError: if there is no such metric.
    """
    known = (*CHOICE_METRICS, *TEXT_METRICS)
    if metric not in known:
        raise TaskError(f"the metric of task '{task}' must be one of {list(known)}", found=metric)


def exact_match(answer: str, references: Sequence[str]) -> float:
    r"""1 if the answer equals a reference; runs of white space count as one space, case counts.

    >>> exact_match(" Paris\n", ["Paris"])
    1.0
    """
    return float(" ".join(answer.split()) in {" ".join(reference.split()) for reference in references})


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Largest ROUGE-L F-measure over the references, words stemmed, by the package rouge-score.

    Raises:
        MissingExtraError: if rouge-score is not installed.
    """
    scorer = _rouge_scorer()
    return max(float(scorer.score(reference, answer)["rougeL"].fmeasure) for reference in references)


def text_score(metric: str, answer: str, references: Sequence[str]) -> float:
    """Score of a generated answer under one of `TEXT_METRICS`."""
    return exact_match(answer, references) if metric == "em" else rouge_l(answer, references)


def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingExtraError("rouge-score", "eval") from error
    return RougeScorer(["rougeL"], use_stemmer=True)
