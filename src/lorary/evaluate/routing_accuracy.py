"""How much of the routing goes where the oracle would go: to the expert of the task."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import torch

from lorary.data.batching import length_buckets
from lorary.evaluate.routing import as_shares
from lorary.model.features import MAX_TOKENS
from lorary.model.plan import constant_weights
from lorary.model.seating import Seating, seating
from lorary.model.trace import trace


@dataclass(frozen=True)
class RoutingAccuracy:
    """Where a router sends the prompts of a task that has an expert of its own.

    Args:
        library: name of the library.
        router: the router as it is written.
        task: name of the task.
        family: its family.
        expert: the oracle's.
        share: mean share of the routing weight that this expert gets, over prompt tokens and the layers it has.
        top1: part of these tokens and layers in which it is the strongest.
        chance: what a router that looks at nothing would give it: 1 / experts that may be chosen.
        rows: prompts looked at.
    """

    library: str
    router: str
    task: str
    family: str
    expert: str
    share: float
    top1: float
    chance: float
    rows: int


class Accuracy(NamedTuple):
    """The numbers of a `RoutingAccuracy`."""

    share: float
    top1: float
    chance: float


def decides(model: Any) -> bool:
    """Whether the router in force chooses by what it sees: else there is nothing to be right about."""
    state = seating(model)
    return constant_weights(state.routing, state.experts) is None


@torch.no_grad()
def routing_accuracy(model: Any, prompts: Sequence[Sequence[int]], expert: str) -> Accuracy | None:
    """Trace prompts and count what one expert gets.

    The first token of a prompt is left out where there are others: it is an attention sink, nearly the same for every
    prompt.

    Args:
        model: routed, by a router that decides.
        prompts: token ids, at least one row.
        expert: the right one.

    Returns:
        The numbers; None where the expert may not be chosen anywhere.
    """
    state = seating(model)
    layers = [path for path, layer in state.layers.items() if state.experts.index(expert) in layer.experts]
    if not layers or not state.routing.may_choose(expert):
        return None
    share, top1, pairs = 0.0, 0.0, 0
    for bucket in length_buckets([len(prompt) for prompt in prompts], MAX_TOKENS):
        for weight, leads in _traced(model, state, [prompts[i] for i in bucket], expert, layers):
            share, top1, pairs = share + float(weight.sum()), top1 + float(leads.sum()), pairs + weight.numel()
    return Accuracy(share / pairs, top1 / pairs, _chance(state, layers)) if pairs else None


def _traced(
    model: Any, state: Seating, prompts: Sequence[Sequence[int]], expert: str, layers: Sequence[str]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Share of the expert and whether it leads, for the tokens that count, layer by layer."""
    input_ids, mask = _right_padded(prompts)
    device = next(model.parameters()).device
    with trace(model) as traced:
        model(input_ids=input_ids.to(device), attention_mask=mask.to(device), use_cache=False)
    counts = mask.bool()
    counts[:, 0] &= mask.sum(dim=1) == 1
    position = state.experts.index(expert)
    by_layer = []
    for path in (path for path in layers if path in traced.layers):
        shares = as_shares(traced.weights(path)[counts])
        by_layer.append((shares[:, position], (shares.argmax(dim=-1) == position).double()))
    return by_layer


def _right_padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention mask, both (batch, seq)."""
    seq = max(len(prompt) for prompt in prompts)
    input_ids, mask = torch.zeros(len(prompts), seq, dtype=torch.int64), torch.zeros(len(prompts), seq).long()
    for row, prompt in enumerate(prompts):
        input_ids[row, : len(prompt)] = torch.tensor(prompt)
        mask[row, : len(prompt)] = 1
    return input_ids, mask


def _chance(state: Seating, layers: Sequence[str]) -> float:
    allowed = [state.routing.may_choose(name) for name in state.experts]
    return sum(1 / sum(allowed[i] for i in state.layers[path].experts) for path in layers) / len(layers)


@dataclass(frozen=True)
class RoutingMean:
    """Means of a router's `RoutingAccuracy` over held-in tasks.

    Args:
        library: name of the library.
        router: as it is written.
        family: of the tasks; None for all of them.
        share: mean share of the weight, `share_low` and `share_high` those of the lowest and highest task.
        top1: mean part in which the expert is the strongest; `top1_low` and `top1_high` as for `share`.
        chance: mean of what chance gives.
        tasks: how many.
    """

    library: str
    router: str
    family: str | None
    share: float
    share_low: float
    share_high: float
    top1: float
    top1_low: float
    top1_high: float
    chance: float
    tasks: int


def routing_means(accuracies: Sequence[RoutingAccuracy]) -> list[RoutingMean]:
    """By library and router, over all tasks and then family by family."""
    groups: dict[tuple[str, str, str | None], list[RoutingAccuracy]] = {}
    for by_family in (False, True):
        for accuracy in accuracies:
            key = (accuracy.library, accuracy.router, accuracy.family if by_family else None)
            groups.setdefault(key, []).append(accuracy)
    return [
        RoutingMean(*key, *_spread([a.share for a in group]), *_spread([a.top1 for a in group]),
                    fmean(a.chance for a in group), len(group))
        for key, group in groups.items()
    ]  # fmt: skip


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return fmean(values), min(values), max(values)
