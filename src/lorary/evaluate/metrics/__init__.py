"""The metrics by name: what a manifest may ask for, and how an answer is scored in 0..1, higher is better."""

from collections.abc import Callable, Mapping, Sequence

from lorary.errors import TaskError
from lorary.evaluate.metrics.exact import exact_match, normalised_match
from lorary.evaluate.metrics.f1 import token_f1
from lorary.evaluate.metrics.passing import parse_pass
from lorary.evaluate.metrics.rouge import rouge_l

# Read off log-likelihoods of the options.
CHOICE_METRICS = ("acc", "acc_no_eos", "acc_raw")
# Read off a generated answer and the references.
TEXT_METRICS: Mapping[str, Callable[[str, Sequence[str]], float]] = {
    "em": exact_match,
    "em_normalised": normalised_match,
    "rougeL": rouge_l,
    "rougeL_single": rouge_l,  # over one reference, which `lorary.evaluate.metrics.rouge.single_reference` draws
    "f1": token_f1,
}
# Reported beside the metric of every task; not in 0..1, so that no task may be scored by them.
REPORTED = ("loss", "perplexity")


def check_metric(metric: str, task: str) -> None:
    """Refuse a metric that cannot be computed, or that is no score in 0..1.

    Raises:
        TaskError: if there is no such metric, or it is reported anyway and must not be what counts.
    """
    if metric in REPORTED:
        raise TaskError(
            f"the metric of task '{task}' must be a score in 0..1, higher is better",
            found=metric,
            remedy=f"leave it out: {' and '.join(REPORTED)} are reported beside every metric",
        )
    if metric not in CHOICE_METRICS and metric not in TEXT_METRICS and parse_pass(metric) is None:
        known = [*CHOICE_METRICS, *TEXT_METRICS, "pass@1"]
        raise TaskError(f"the metric of task '{task}' must be one of {known}, or pass@k of another k", found=metric)


def text_score(metric: str, answer: str, references: Sequence[str]) -> float:
    """Score of a generated answer under one of `TEXT_METRICS`."""
    return TEXT_METRICS[metric](answer, references)
