"""How a model answers the rows of one task: the loss of the reference and the task's metric, row by row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorary.data.tasks import Row
from lorary.data.template import Template, warn_of_cuts
from lorary.errors import TaskError
from lorary.evaluate.generation import generate_answers
from lorary.evaluate.loglik import AnswerLoss, answer_losses, choose_options
from lorary.evaluate.metrics import CHOICE_METRICS, check_metric, text_score


@dataclass(frozen=True)
class RowScores:
    """Scores of one task's rows.

    Args:
        loss: nats per target token (EOS included) of each row's target.
        metric: name of the task's metric.
        score: that metric for each row, in 0..1, higher is better.
    """

    loss: list[float]
    metric: str
    score: list[float]


def score_rows(model: Any, tokenizer: Any, template: Template, rows: Sequence[Row], metric: str) -> RowScores:
    """Score a model on rows of one task.

    Args:
        model: a transformers model for causal language modelling, routed or not.
        tokenizer: its tokenizer.
        template: how rows become prompts.
        rows: at least one row, all of one task.
        metric: `acc` (options ranked by length-normalised log-likelihood), `acc_raw` (by their sum), `em`, `rougeL`;
            where rows list no options to rank, exact match takes the place of `acc`, and the scores say so.

    Returns:
        The scores, in the order of the rows.

    Raises:
        TaskError: if there are no rows, or the metric does not exist.
    """
    if not rows:
        raise TaskError("a task must have rows to be evaluated on", found="none")
    check_metric(metric, rows[0].task)
    warn_of_cuts(rows[0].task, [template.encode(row.source, row.target) for row in rows])
    if metric in CHOICE_METRICS and any(len(row.options) < 2 for row in rows):
        metric = "em"  # nothing to rank: some classification tasks list no options
    if metric in CHOICE_METRICS:
        return _score_choices(model, template, rows, metric)
    losses = answer_losses(model, [template.encode(row.source, row.target) for row in rows])
    references = [row.references for row in rows]
    # An answer longer than every reference matches none of them, so that it may be cut there.
    longest = max(len(template.encode(row.source, r).target_ids) for row in rows for r in row.references)
    prompts = [template.encode_prompt(row.source) for row in rows]
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=longest)
    scores = [text_score(metric, answer, refs) for answer, refs in zip(answers, references, strict=True)]
    return RowScores([loss.mean for loss in losses], metric, scores)


def _score_choices(model: Any, template: Template, rows: Sequence[Row], metric: str) -> RowScores:
    examples = [template.encode(row.source, option) for row in rows for option in row.options]
    flat = iter(answer_losses(model, examples))
    by_row: list[list[AnswerLoss]] = [[next(flat) for _ in row.options] for row in rows]
    chosen = choose_options(by_row, normalise=metric == "acc")
    scores = [float(row.options[best] in row.references) for row, best in zip(rows, chosen, strict=True)]
    losses = [own[row.options.index(row.target)].mean for row, own in zip(rows, by_row, strict=True)]
    return RowScores(losses, metric, scores)
