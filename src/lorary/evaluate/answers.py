"""How a model answers the rows of one task: the loss of the reference and the task's metric, row by row."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorary.data.schema import Row, shorten
from lorary.data.template import Example, Ids, Template, warn_of_cuts
from lorary.errors import TaskError
from lorary.evaluate.decoding import Decoding, decoding_of, sample_seeds
from lorary.evaluate.generation import generate_answers
from lorary.evaluate.loglik import AnswerLoss, answer_losses
from lorary.evaluate.metrics.choice import ChoiceMetric
from lorary.evaluate.metrics.exact import EM
from lorary.evaluate.metrics.metric import AnswerMetric, Metric
from lorary.evaluate.options import scored_pairs
from lorary.evaluate.sandbox import Sandbox
from lorary.model.verdict import context_of


@dataclass(frozen=True)
class RowScores:
    """Scores of one task's rows.

    Args:
        loss: nats per target token (EOS included) of each row's target.
        metric: name of the task's metric.
        score: that metric for each row, in 0..1, higher is better.
        answers: what each row was answered with: the text that was generated (of several samples the first), or the
            option that was chosen.
    """

    loss: list[float]
    metric: str
    score: list[float]
    answers: list[str]


def score_rows(
    model: Any,
    tokenizer: Any,
    template: Template,
    rows: Sequence[Row],
    metric: Metric,
    *,
    sandbox: Sandbox | None = None,
    among: Sequence[Row] | None = None,
) -> RowScores:
    """Score a model on rows of one task.

    Args:
        model: a transformers model for causal language modelling, routed or not.
        tokenizer: its tokenizer.
        template: how rows become prompts.
        rows: at least one row, all of one task.
        metric: of the task. Where rows list no options to rank, exact match takes the place of a metric that ranks
            them, and the scores say so.
        sandbox: where generated programs run; without it `pass@k` is refused.
        among: all rows of the task that are scored, where these are a part of them: they decide which metric is meant,
            and how long an answer may be.

    Returns:
        The scores, in the order of the rows.

    Raises:
        TaskError: if there are no rows, the metric may not run programs, or `extra` of a row does not say what the
            metric needs.
    """
    if not rows:
        raise TaskError("a task must have rows to be evaluated on", found="none")
    metric.check(rows, sandbox)
    among = among or rows
    if isinstance(metric, ChoiceMetric):
        if all(len(row.options) > 1 for row in among):
            return _score_choices(model, template, rows, metric)
        metric = EM  # nothing to rank: some classification tasks list no options
    assert isinstance(metric, AnswerMetric)
    examples = [template.encode(row.prompt, row.target) for row in rows]
    warn_of_cuts(rows[0].task, examples)
    losses = answer_losses(model, examples)
    # What an answer says beyond the longest reference is not waited for, and not held against it.
    default = metric.decoding or Decoding(
        max(len(template.encode(row.prompt, text).target_ids) for row in among for text in row.references)
    )
    answers = _answers(model, tokenizer, template, rows, default, keep_breaks=metric.keep_breaks)
    scores = [metric.score(row, samples, sandbox) for row, samples in zip(rows, answers, strict=True)]
    return RowScores([loss.mean for loss in losses], metric.name, scores, [samples[0] for samples in answers])


def _score_choices(model: Any, template: Template, rows: Sequence[Row], metric: ChoiceMetric) -> RowScores:
    by_option = [[template.encode(source, answer) for source, answer in scored_pairs(row)] for row in rows]
    _check_cuts(rows, by_option)
    flat = iter(answer_losses(model, [example for options in by_option for example in options]))
    by_row: list[list[AnswerLoss]] = [[next(flat) for _ in row.options] for row in rows]
    answers = [row.options[best] for row, best in zip(rows, metric.choose(by_row), strict=True)]
    scores = [float(answer in row.references) for row, answer in zip(rows, answers, strict=True)]
    losses = [row_losses[row.options.index(row.target)].mean for row, row_losses in zip(rows, by_row, strict=True)]
    return RowScores(losses, metric.name, scores, answers)


def _check_cuts(rows: Sequence[Row], by_option: Sequence[Sequence[Example]]) -> None:
    """Tell of prompts that were cut, and refuse options that differ in nothing but what was cut off.

    Raises:
        TaskError: if there are such: the first of them would always win.
    """
    for row, options in zip(rows, by_option, strict=True):
        left = {(example.prompt_ids, example.target_ids) for example in options}
        if len(left) < len(options) and any(example.truncated for example in options):
            raise TaskError(
                f"options of task '{row.task}' must differ within max_length",
                found=f"two that are the same once cut, of '{shorten(row.source)}'",
                remedy="raise max_length, or remove the row",
            )
    warn_of_cuts(rows[0].task, [max(options, key=lambda example: example.truncated) for options in by_option])


def _answers(
    model: Any,
    tokenizer: Any,
    template: Template,
    rows: Sequence[Row],
    default: Decoding,
    *,
    keep_breaks: bool,
) -> list[list[str]]:
    """The answers of each row; rows that are decoded alike are generated together."""
    groups: dict[Decoding, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(decoding_of(row, default), []).append(i)
    answers: list[list[str]] = [[] for _ in rows]
    for how, members in groups.items():
        samples = how.samples if how.temperature > 0 else 1  # the likeliest answer is the same each time
        is_asked = how.max_new_tokens != default.max_new_tokens
        fed, most = _fitted(template, [rows[i] for i in members], how.max_new_tokens, context_of(model), is_asked)
        owners = [i for i in members for _ in range(samples)]
        texts = generate_answers(
            model,
            tokenizer,
            [prompt for prompt in fed for _ in range(samples)],
            most,
            stop=how.stop,
            temperature=how.temperature,
            top_p=how.top_p,
            seeds=[seed for i in members for seed in sample_seeds(rows[i], samples)],
        )
        for i, text in zip(owners, texts, strict=True):
            # Before a text that stops somewhere, line breaks are no part of it; before a program they may be.
            answers[i].append(text.lstrip("\n") if how.stop and not keep_breaks else text)
    return answers


def _fitted(
    template: Template, rows: Sequence[Row], max_new_tokens: int, context: int | None, is_asked: bool
) -> tuple[list[Ids], int]:
    """Prompts of rows with room for the answer behind them in the model's context, and the most tokens it may have.

    An answer that would leave no room for a prompt gets half the context at most; rows that ask for more are told of.
    """
    prompts = [template.encode_prompt(row.prompt) for row in rows]
    if context is None:
        return prompts, max_new_tokens
    least = len(template.head) + 1
    if max_new_tokens > context - least:
        requested, max_new_tokens = max_new_tokens, min(context // 2, context - least)
        if is_asked:
            message = (
                f"task '{rows[0].task}': answers have at most {max_new_tokens} of the {requested} tokens they ask for"
            )
            warnings.warn(f"{message}, since the base has {context} positions", stacklevel=2)
    room = context - max_new_tokens
    cut = [
        prompt if len(prompt) <= room else template.encode_prompt(row.prompt, room)
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    # Rows that are too long with their target as well have been told of.
    lost = [
        0 if len(new) == len(old) or template.encode(row.prompt, row.target).truncated else len(old) - len(new)
        for row, old, new in zip(rows, prompts, cut, strict=True)
    ]
    warn_of_cuts(rows[0].task, [Example(new, (), number) for new, number in zip(cut, lost, strict=True)])
    return cut, max_new_tokens
