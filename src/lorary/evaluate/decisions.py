"""Decisions of a router for whole requests, taken once per prompt, before anything is scored."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lorary.data.template import Ids
from lorary.model.decision import Request
from lorary.model.features import prompt_batches
from lorary.model.seating import seating
from lorary.route.setting import CHAT, Routing


@dataclass(frozen=True)
class Decision:
    """What was decided for one prompt.

    Args:
        weights: routing weight by expert, of those that have one; none where the base answers.
        best: the expert with the best score.
        confidence: that score, in units of the rule.
        is_lost: whether no expert could be chosen, so that the fallback answers.
        rule: the router that decided; another one than was asked for where that only picks one.
        scores: of every expert that may be chosen, in units of the rule.
        prefers_mean: whether evidence of the library speaks for the mean of all experts where the base would answer.
    """

    weights: tuple[tuple[str, float], ...]
    best: str
    confidence: float
    is_lost: bool
    rule: str
    scores: tuple[tuple[str, float], ...] = ()
    prefers_mean: bool = False

    def of_base(self) -> "Decision":
        """The same where the base answers."""
        return replace(self, weights=())

    def sentence(self, routing: Routing) -> str:
        """What was decided, and why.

        Args:
            routing: the setting that decided.
        """
        who = routing.router if routing.router == self.rule else f"{routing.router}, by {self.rule}"
        border = routing.choosing.threshold
        against = "" if border is None else f" against a border of {border:g}"
        if not self.is_lost:
            named = ", ".join(f"{name} {weight:.0%}" for name, weight in self.weights)
            return f"{who}: {named} (score {self.confidence:.2f}{against})"
        last = self.weights[0][0] if self.weights else "the base"
        last = "the mean of all experts" if len(self.weights) > 1 else last
        return f"{who}: no expert fits, and {last} answers (best: {self.best}, score {self.confidence:.2f}{against})"

    def setting(self, routing: Routing) -> Routing:
        """The setting that lets these experts answer, whatever the prompt.

        Args:
            routing: the one that decided.
        """
        if not self.weights:
            return Routing("base")
        return routing.changed(experts=dict(self.weights), fallback=None)


def decides_once(model: Any) -> bool:
    """Whether the router in force decides for whole requests, all rows alike."""
    state = seating(model)
    return state.prober is not None and state.in_force.row_settings is None


@torch.no_grad()
def decide(model: Any, prompts: Sequence[Ids]) -> list[Decision]:
    """Let the router in force decide for each prompt; equal prompts are looked at once.

    Args:
        model: a routed model whose router decides for whole requests.
        prompts: token ids.

    Returns:
        One decision per prompt, in the order given.
    """
    state = seating(model)
    assert state.prober is not None
    (request,) = state.prober.requests
    assert request is not None
    different = list(dict.fromkeys(map(tuple, prompts)))
    by_prompt: dict[Ids, Decision] = {}
    for bucket, ids, real in prompt_batches(model, different):
        state.prober.decide(model, {"input_ids": ids, "attention_mask": real.long()})
        decided = zip(bucket, decisions_of(request, state.experts), strict=True)
        by_prompt.update((different[i], decision) for i, decision in decided)
    state.prober.forget()
    return [by_prompt[tuple(prompt)] for prompt in prompts]


def decisions_of(request: Request, experts: Sequence[str]) -> list[Decision]:
    """What a router has decided, row by row.

    Args:
        request: that was decided.
        experts: names, in canonical order.
    """
    chosen, scores, is_lost, prefers_mean = request.chosen, request.scores, request.is_lost, request.prefers_mean
    assert chosen is not None
    assert scores is not None
    assert prefers_mean is not None
    decisions = []
    dense, (confidence, best) = chosen.dense(len(experts)).tolist(), scores.max(dim=1)
    for row, weights in enumerate(dense):
        named = tuple((name, weight) for name, weight in zip(experts, weights, strict=True) if weight)
        each = zip(experts, scores[row].tolist(), strict=True)
        known = tuple((name, score) for name, score in each if math.isfinite(score))
        decisions.append(
            Decision(
                named, experts[int(best[row])], float(confidence[row]), bool(is_lost[row]), request.rule, known,
                bool(prefers_mean[row]),
            )
        )  # fmt: skip
    return decisions


def asks_base(routing: Routing, decision: Decision) -> bool:
    """Whether the base is to answer in its own chat template.

    It answers freely there. Ranking given options by their likelihood is another matter: in a chat the base expects a
    sentence, and ranks worse than the mean of all experts (docs/results/README.md). So callers do not ask for options.
    """
    return decision.is_lost and routing.fallback == CHAT and not decision.prefers_mean
