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
from lorary.evaluate.loglik import AnswerLoss, answer_losses, choose_options
from lorary.evaluate.metrics import CHOICE_METRICS, check_metric, text_score
from lorary.evaluate.metrics.passing import parse_pass
from lorary.evaluate.metrics.rouge import single_reference, warn_of_silence
from lorary.evaluate.options import scored_pairs
from lorary.evaluate.programs import check_runner, default_decoding, pass_score
from lorary.evaluate.sandbox import Sandbox
from lorary.model.verdict import context_of


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


def score_rows(
    model: Any,
    tokenizer: Any,
    template: Template,
    rows: Sequence[Row],
    metric: str,
    *,
    sandbox: Sandbox | None = None,
) -> RowScores:
    """Score a model on rows of one task.

    Args:
        model: a transformers model for causal language modelling, routed or not.
        tokenizer: its tokenizer.
        template: how rows become prompts.
        rows: at least one row, all of one task.
        metric: one of `CHOICE_METRICS` (options ranked by log-likelihood) or `TEXT_METRICS` (a generated answer against
            the references), or `pass@k` (generated programs against their tests). Where rows list no options to rank,
            exact match takes the place of the former, and the scores say so.
        sandbox: where generated programs run; without it `pass@k` is refused.

    Returns:
        The scores, in the order of the rows.

    Raises:
        TaskError: if there are no rows, the metric does not exist or may not run programs, or `extra` of a row does not
            say what the metric needs.
    """
    if not rows:
        raise TaskError("a task must have rows to be evaluated on", found="none")
    check_metric(metric, rows[0].task)
    check_runner(metric, rows, sandbox)
    if metric in CHOICE_METRICS and any(len(row.options) < 2 for row in rows):
        metric = "em"  # nothing to rank: some classification tasks list no options
    if metric in CHOICE_METRICS:
        return _score_choices(model, template, rows, metric)
    examples = [template.encode(row.source, row.target) for row in rows]
    warn_of_cuts(rows[0].task, examples)
    losses = answer_losses(model, examples)
    if (k := parse_pass(metric)) is not None and sandbox is not None:
        answers = _answers(model, tokenizer, template, rows, default_decoding(k), keep_breaks=True)
        scores = [pass_score(row, own, k, sandbox) for row, own in zip(rows, answers, strict=True)]
    else:
        # What an answer says beyond the longest reference is not waited for, and not held against it.
        longest = max(len(template.encode(row.source, r).target_ids) for row in rows for r in row.references)
        answers = _answers(model, tokenizer, template, rows, Decoding(longest), keep_breaks=False)
        references = [(single_reference(row),) if metric == "rougeL_single" else row.references for row in rows]
        if metric.startswith("rougeL"):
            warn_of_silence(rows[0].task, references)
        scores = [
            sum(text_score(metric, answer, refs) for answer in own) / len(own)
            for own, refs in zip(answers, references, strict=True)
        ]
    return RowScores([loss.mean for loss in losses], metric, scores)


def _score_choices(model: Any, template: Template, rows: Sequence[Row], metric: str) -> RowScores:
    by_option = [[template.encode(source, answer) for source, answer in scored_pairs(row)] for row in rows]
    _check_cuts(rows, by_option)
    flat = iter(answer_losses(model, [example for own in by_option for example in own]))
    by_row: list[list[AnswerLoss]] = [[next(flat) for _ in row.options] for row in rows]
    chosen = choose_options(by_row, normalise=metric != "acc_raw", count_eos=metric != "acc_no_eos")
    scores = [float(row.options[best] in row.references) for row, best in zip(rows, chosen, strict=True)]
    losses = [own[row.options.index(row.target)].mean for row, own in zip(rows, by_row, strict=True)]
    return RowScores(losses, metric, scores)


def _check_cuts(rows: Sequence[Row], by_option: Sequence[Sequence[Example]]) -> None:
    """Tell of prompts that were cut, and refuse options that differ in nothing but what was cut off.

    Raises:
        TaskError: if there are such: the first of them would always win.
    """
    for row, own in zip(rows, by_option, strict=True):
        left = {(example.prompt_ids, example.target_ids) for example in own}
        if len(left) < len(own) and any(example.truncated for example in own):
            raise TaskError(
                f"options of task '{row.task}' must differ within max_length",
                found=f"two that are the same once cut, of '{shorten(row.source)}'",
                remedy="raise max_length, or remove the row",
            )
    warn_of_cuts(rows[0].task, [max(own, key=lambda example: example.truncated) for own in by_option])


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
    prompts = [template.encode_prompt(row.source) for row in rows]
    if context is None:
        return prompts, max_new_tokens
    least = len(template.head) + 1
    if max_new_tokens > context - least:
        asked, max_new_tokens = max_new_tokens, min(context // 2, context - least)
        if is_asked:
            message = f"task '{rows[0].task}': answers have at most {max_new_tokens} of the {asked} tokens they ask for"
            warnings.warn(f"{message}, since the base has {context} positions", stacklevel=2)
    room = context - max_new_tokens
    cut = [
        prompt if len(prompt) <= room else template.encode_prompt(row.source, room)
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    # Rows that are too long with their target as well have been told of.
    lost = [
        0 if len(new) == len(old) or template.encode(row.source, row.target).truncated else len(old) - len(new)
        for row, old, new in zip(rows, prompts, cut, strict=True)
    ]
    warn_of_cuts(rows[0].task, [Example(new, (), number) for new, number in zip(cut, lost, strict=True)])
    return cut, max_new_tokens
