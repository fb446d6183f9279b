"""One prompt and its answer, run through a routed model in one pass that is recorded."""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from lorary.data.template import Example, make_template
from lorary.data.text_of_ids import text_of_ids, texts_of_ids
from lorary.evaluate.completion import check_context, complete, prompt_ids
from lorary.evaluate.explanation import SeenPrompt, SeenToken
from lorary.evaluate.generation import stop_ids
from lorary.evaluate.prompts import Prompt
from lorary.evaluate.routing import SINK_RATIO, norm_ratios
from lorary.model.attach import routing
from lorary.model.base import Base
from lorary.model.plan import constant_weights
from lorary.model.probe import deciding_by
from lorary.model.seating import prober_of, seating
from lorary.model.trace import trace
from lorary.route.setting import Routing

FIRST_TOKEN = "first token of the row"


@dataclass(frozen=True)
class TracedPrompt:
    """A traced prompt.

    Args:
        seen: the trace.
        example: the ids behind it.
        layers: paths of those that decided.
    """

    seen: SeenPrompt
    example: Example
    layers: list[str]


def see(base: Base, prompt: Prompt, template: str, other: Routing | None, max_new_tokens: int) -> TracedPrompt:
    """Answer a prompt where it comes without an answer, and record one uncached pass over both.

    Args:
        base: with experts seated.
        prompt: to explain.
        template: `plain` or `chat`.
        other: another router to record beside the one in force.
        max_new_tokens: most tokens of an answer of its own.

    Returns:
        The trace.

    Raises:
        UsageError: if prompt and answer do not fit the base's positions.
    """
    example = _example(base, prompt, template, max_new_tokens)
    stops = {*stop_ids(base.model, base.tokenizer)}
    is_finished = example.target_ids[-1] in stops
    shown = example.target_ids[:-1] if is_finished else example.target_ids
    answer = prompt.answer
    if answer is None:
        answer = text_of_ids(base.tokenizer, shown, example.prompt_ids).strip()
    layers, weights, left_out = trace_example(base, example)
    against = None
    if other is not None and weights is not None:
        with routing(base.model, other):
            other_layers, against, _ = trace_example(base, example)
        assert against is None or other_layers == layers
    parts = ["prompt"] * len(example.prompt_ids) + ["answer"] * (len(example.target_ids) - 1)
    texts = texts_of_ids(base.tokenizer, (*example.prompt_ids, *example.target_ids[:-1]))
    tokens = [SeenToken(*fields) for fields in zip(texts, parts, left_out, strict=True)]
    is_given = prompt.answer is not None
    recorded = SeenPrompt(
        prompt.text, answer, is_given, is_finished, len(example.target_ids), tokens, weights, against
    )  # fmt: skip
    return TracedPrompt(recorded, example, layers)


def _example(base: Base, prompt: Prompt, template: str, max_new_tokens: int) -> Example:
    if prompt.answer is None:
        ids = prompt_ids(base, prompt.text, template, max_new_tokens)
        # These very ids: the text they decode to may be cut otherwise when it is encoded again.
        return Example(ids, tuple(complete(base, ids, max_new_tokens=max_new_tokens)), 0)
    example = make_template(template, base.tokenizer, max_length=sys.maxsize).encode(prompt.text, prompt.answer)
    check_context(base, len(example.prompt_ids), len(example.target_ids))
    return example


def trace_example(base: Base, example: Example) -> tuple[list[str], Tensor | None, list[str]]:
    """Record one uncached pass over a prompt and its answer: one row alone, so that there is no padding to leave out.

    Args:
        base: with experts seated.
        example: the ids; the last one of the answer is not read.

    Returns:
        The layers that decided, their weights (layers, tokens, experts), None where nothing decides, and for each token
        why it is left out of statistics, empty where it counts.
    """
    ids = [*example.prompt_ids, *example.target_ids[:-1]]
    input_ids = torch.tensor([ids], device=base.model.device)
    is_prompt = torch.arange(len(ids), device=base.model.device)[None] < len(example.prompt_ids)
    with torch.no_grad(), trace(base.model) as traced, deciding_by(prober_of(base.model), is_prompt):
        states = base.model(input_ids=input_ids, use_cache=False, output_hidden_states=True).hidden_states
    # Some tokens stand out where a model keeps its hidden states to itself, too; the first one is known in any case.
    norms = [state[0].double().norm(dim=-1).cpu() for state in states or ()]
    ratios = norm_ratios(torch.stack(norms)).tolist() if norms else [0.0] * len(ids)
    left_out = [FIRST_TOKEN] + [_why(ratio) for ratio in ratios[1:]]
    if constant_weights(seating(base.model).routing, traced.experts) is not None or not traced.layers:
        return [], None, left_out  # the same for every token, recorded or not
    return traced.layers, traced.stacked()[:, 0], left_out


def _why(ratio: float) -> str:
    return f"norm {ratio:.0f} times the median" if ratio > SINK_RATIO else ""
