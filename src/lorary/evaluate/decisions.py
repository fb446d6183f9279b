"""Decisions of a router for whole requests, taken once per prompt, before anything is scored."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorary.data.template import Ids
from lorary.model.features import prompt_batches
from lorary.model.seating import seating
from lorary.route.setting import CHAT, Routing


@dataclass(frozen=True)
class Decision:
    """What was decided for one prompt.

    Args:
        weights: routing weight by expert, of those that have one; none where the base answers.
        confidence: the best score of an expert, in units of the rule.
        is_lost: whether no expert could be chosen, so that the fallback answers.
    """

    weights: tuple[tuple[str, float], ...]
    confidence: float
    is_lost: bool

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
    return state.prober is not None and state.rows is None


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
        chosen, confidence, is_lost = request.chosen, request.confidence, request.is_lost
        assert chosen is not None and confidence is not None and is_lost is not None
        dense = chosen.dense(len(state.experts)).tolist()
        for i, weights, best, lost in zip(bucket, dense, confidence.tolist(), is_lost.tolist(), strict=True):
            named = tuple((name, weight) for name, weight in zip(state.experts, weights, strict=True) if weight)
            by_prompt[different[i]] = Decision(named, best, lost)
    state.prober.forget()
    return [by_prompt[tuple(prompt)] for prompt in prompts]


def asks_base(routing: Routing, decision: Decision) -> bool:
    """Whether the base is to answer in its own chat template."""
    return decision.is_lost and routing.fallback == CHAT
