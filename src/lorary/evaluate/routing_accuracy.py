"""Where prompts are sent: to which experts, and how much of it where the oracle would go, to the expert of the task."""

from collections.abc import Iterator, Sequence
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

DIGITS = 4


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


@dataclass(frozen=True)
class RoutingUsage:
    """Which experts a router sends the prompts of a task to.

    Args:
        library: name of the library.
        router: the router as it is written.
        task: name of the task.
        usage: mean share of the routing weight of each expert that has any, over prompt tokens and layers; the base has
            the rest of 1.
        strongest: for each prompt the expert with the largest mean share (None: the base), and that share.
    """

    library: str
    router: str
    task: str
    usage: dict[str, float]
    strongest: list[tuple[str | None, float]]


class Accuracy(NamedTuple):
    """The numbers of a `RoutingAccuracy`."""

    share: float
    top1: float
    chance: float


class RoutingLook(NamedTuple):
    """What the traces of some prompts say.

    Args:
        usage: as in `RoutingUsage`.
        strongest: as in `RoutingUsage`.
        accuracy: of one expert; None where none was asked about, or it may not be chosen anywhere.
    """

    usage: dict[str, float]
    strongest: list[tuple[str | None, float]]
    accuracy: Accuracy | None


def decides(model: Any) -> bool:
    """Whether the router in force chooses by what it sees: else there is nothing to be right about."""
    state = seating(model)
    return constant_weights(state.routing, state.experts) is None


@torch.no_grad()
def look_at_routing(model: Any, prompts: Sequence[Sequence[int]], expert: str | None) -> RoutingLook:
    """Trace prompts and count what the experts get.

    The first token of a prompt is left out where there are others: it is an attention sink, nearly the same for every
    prompt.

    Args:
        model: routed, by a router that decides.
        prompts: token ids, at least one row.
        expert: the one whose accuracy is counted; None for none.

    Returns:
        The numbers, rounded to ten-thousandths where they are of single experts.
    """
    state = seating(model)
    layers = _layers_of(state, expert)
    position = state.experts.index(expert) if expert is not None else -1
    sums = torch.zeros(len(prompts), len(state.experts) + 1, dtype=torch.float64)
    share, top1, pairs = 0.0, 0.0, 0
    for bucket in length_buckets([len(prompt) for prompt in prompts], MAX_TOKENS):
        for path, prompt_index, shares in _traced(model, [prompts[i] for i in bucket]):
            sums.index_add_(0, torch.tensor(bucket)[prompt_index], shares)
            if path in layers:
                share += float(shares[:, position].sum())
                top1 += int((shares.argmax(dim=-1) == position).sum())
                pairs += len(shares)
    accuracy = Accuracy(share / pairs, top1 / pairs, _chance(state, layers)) if pairs else None
    return RoutingLook(*_usage(sums, state.experts), accuracy)


def _layers_of(state: Seating, expert: str | None) -> list[str]:
    """The layers in which an expert may be chosen; none without an expert."""
    if expert is None or not state.routing.may_choose(expert):
        return []
    return [path for path, layer in state.layers.items() if state.experts.index(expert) in layer.experts]


def _usage(sums: torch.Tensor, experts: Sequence[str]) -> tuple[dict[str, float], list[tuple[str | None, float]]]:
    """Usage and strongest experts, from (prompts, experts and base) sums of shares over tokens and layers."""
    if not bool(sums.any()):
        return {}, []
    names: list[str | None] = [*experts, None]
    # Every pair of token and layer adds 1 in all.
    usage = (sums.sum(dim=0) / sums.sum()).tolist()[:-1]
    largest, positions = (sums / sums.sum(dim=1, keepdim=True).clamp_min(1)).max(dim=1)
    strongest = zip(positions.tolist(), largest.tolist(), strict=True)
    return (
        {name: round(share, DIGITS) for name, share in zip(experts, usage, strict=True) if share > 0},
        [(names[position], round(share, DIGITS)) for position, share in strongest],
    )


def _traced(model: Any, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Layer by layer its path and, for the tokens that count, the position of their prompt and their shares."""
    input_ids, mask = _right_padded(prompts)
    device = next(model.parameters()).device
    with trace(model) as traced:
        model(input_ids=input_ids.to(device), attention_mask=mask.to(device), use_cache=False)
    counts = mask.bool()
    counts[:, 0] &= mask.sum(dim=1) == 1
    prompt_index = counts.nonzero()[:, 0]
    for path in traced.layers:
        yield path, prompt_index, as_shares(traced.weights(path)[counts])


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
