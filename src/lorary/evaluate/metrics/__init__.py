"""The metrics by name: what a manifest may ask for."""

import warnings
from collections.abc import Mapping

from lorary.data.schema import Task
from lorary.errors import TaskError
from lorary.evaluate.metrics.choice import ACC, ACC_NO_EOS, ACC_RAW, ChoiceMetric
from lorary.evaluate.metrics.exact import EM, EM_NORMALISED
from lorary.evaluate.metrics.f1 import F1
from lorary.evaluate.metrics.metric import AnswerMetric, Metric
from lorary.evaluate.metrics.passing import PassMetric, parse_pass, pass_metric
from lorary.evaluate.metrics.rouge import ROUGE_L, ROUGE_L_SINGLE

CHOICE_METRICS: Mapping[str, ChoiceMetric] = {metric.name: metric for metric in (ACC, ACC_NO_EOS, ACC_RAW)}
TEXT_METRICS: Mapping[str, AnswerMetric] = {
    metric.name: metric for metric in (EM, EM_NORMALISED, ROUGE_L, ROUGE_L_SINGLE, F1)
}
METRICS: Mapping[str, Metric] = {**CHOICE_METRICS, **TEXT_METRICS}
# For readers.
METRIC_NAMES = {name: metric.title for name, metric in METRICS.items()}
METRIC_MEANINGS = {name: metric.meaning for name, metric in METRICS.items() if metric.meaning}
# Reported beside the metric of every task; not in 0..1, so that no task may be scored by them.
REPORTED = ("loss", "perplexity")


def find_metric(name: str, task: str) -> Metric:
    """The metric of a task.

    Args:
        name: as the task writes it.
        task: which, for the error.

    Raises:
        TaskError: if there is no such metric, or it is reported anyway and must not be what counts.
    """
    if name in REPORTED:
        raise TaskError(
            f"the metric of task '{task}' must be a score in 0..1, higher is better",
            found=name,
            remedy=f"leave it out: {' and '.join(REPORTED)} are reported beside every metric",
        )
    if (k := parse_pass(name)) is not None:
        return pass_metric(k)
    if name not in METRICS:
        names = [*METRICS, "pass@1"]
        raise TaskError(f"the metric of task '{task}' must be one of {names}, or pass@k of another k", found=name)
    return METRICS[name]


def scorable_tasks(tasks: Mapping[str, Task], *, allow_code: bool) -> dict[str, Task]:
    """The tasks that can be scored; those left out since programs may not run are named in a warning.

    Args:
        tasks: by name.
        allow_code: whether generated programs may run.

    Raises:
        TaskError: if a task has no metric that exists, or none is left: what was asked for cannot be done at all.
    """
    metrics = {name: find_metric(task.metric, name) for name, task in tasks.items()}
    code = {name: metric for name, metric in metrics.items() if isinstance(metric, PassMetric) and not allow_code}
    if code and len(code) == len(tasks):
        name, metric = next(iter(code.items()))
        raise metric.not_allowed(name)
    if code:
        warnings.warn(f"left out: {', '.join(code)} (running generated code needs --allow-code)", stacklevel=3)
    return {name: task for name, task in tasks.items() if name not in code}
