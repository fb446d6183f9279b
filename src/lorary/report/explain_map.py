"""The numbers behind the map of layers and experts: of all tokens, and of each token that a reader may choose."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorary.evaluate.explanation import Explanation, SeenPrompt
from lorary.lora.targets import place_of
from lorary.report.plots import packed
from lorary.report.traces import ALL, WEIGHT_PARTS

# Experts with a column of their own, the most used ones; more share the last column.
NUM_COLUMNS = 16
# Weights kept per token and layer, the largest; the usual top_k is 4.
NUM_KEPT = 16
# Bytes of packed weights that a page carries; prompts beyond are shown, but their tokens have no map.
MOST_BYTES = 6_000_000
DIGITS = 4


def map_data(explanation: Explanation) -> dict[str, Any]:
    """What the script draws.

    Args:
        explanation: of a router that decides.

    Returns:
        Kinds and depths; the (kind, depth) of each layer; the column of each expert; the map of all tokens for each
        kind; packed weights of the prompts whose tokens can be chosen.
    """
    places = [place_of(path) for path in explanation.layers]
    kinds, depths = _distinct([kind for kind, _ in places]), _distinct([depth for _, depth in places])
    shown = [ALL, *kinds] if len(kinds) > 1 else kinds
    return {
        "kinds": shown,
        "depths": depths,
        "places": [[kinds.index(kind), depths.index(depth)] for kind, depth in places],
        "columns": column_of(explanation),
        "names": column_names(explanation),
        "usage": [usage_map(explanation, kind) for kind in shown],
        "prompts": [_packed_prompt(prompt) for prompt in selectable(explanation)],
        "parts": WEIGHT_PARTS,
    }


def column_of(explanation: Explanation) -> list[int]:
    """The column of each expert on the map."""
    place = {expert: rank for rank, expert in enumerate(explanation.ranked())}
    return [min(place[i], NUM_COLUMNS) for i in range(len(explanation.experts))]


def column_names(explanation: Explanation) -> list[str]:
    """What is written above the columns."""
    names = [explanation.experts[i] for i in explanation.ranked()]
    num_others = len(names) - NUM_COLUMNS
    return [*names[:NUM_COLUMNS], f"{num_others} others"] if num_others > 0 else names


def usage_map(explanation: Explanation, kind: str) -> list[list[float | None]]:
    """Mean shares of all tokens that count, depth by depth and column by column.

    Args:
        explanation: of a router that decides.
        kind: of layers, or `ALL`.

    Returns:
        Rows by depth; None where no expert of the column may be chosen.
    """
    places = [place_of(path) for path in explanation.layers]
    columns = torch.tensor(column_of(explanation))
    width = int(columns.max()) + 1
    means = explanation.shares[..., :-1].mean(dim=1)  # (layers, experts)
    lines: list[list[float | None]] = []
    for depth in _distinct([depth for _, depth in places]):
        inside = [i for i, (k, d) in enumerate(places) if d == depth and kind in (ALL, k)]
        if not inside:
            lines.append([None] * width)
            continue
        sums = torch.zeros(width, dtype=means.dtype).index_add_(0, columns, means[inside].mean(dim=0))
        reach = torch.zeros(width).index_add_(0, columns, explanation.reach[inside].any(dim=0).float())
        values = zip(sums.tolist(), reach.tolist(), strict=True)
        lines.append([round(value, DIGITS) if can else None for value, can in values])
    return lines


def selectable(explanation: Explanation) -> Sequence[SeenPrompt]:
    """The first prompts, as many as a page carries the weights of."""
    selected, used = [], 0
    for prompt in explanation.prompts:
        assert prompt.weights is not None
        used += 3 * prompt.weights[..., 0].numel() * _num_kept(prompt.weights)
        if used > MOST_BYTES:
            break
        selected.append(prompt)
    return selected


def _packed_prompt(prompt: SeenPrompt) -> dict[str, Any]:
    """Experts and weights of each layer and token, (layers, tokens, kept)."""
    assert prompt.weights is not None
    weights, ids = prompt.weights.topk(_num_kept(prompt.weights), dim=-1)
    # Weights of another scale than 1 are shown as their shares.
    parts = (weights / prompt.weights.sum(dim=-1, keepdim=True).clamp_min(1) * WEIGHT_PARTS).round()
    return {
        "tokens": len(prompt.tokens),
        "kept": ids.shape[-1],
        "ids": packed(ids.numpy(), "<u2"),
        "weights": packed(parts.clamp(0, WEIGHT_PARTS).numpy(), "<u1"),
    }


def _num_kept(weights: Tensor) -> int:
    return min(NUM_KEPT, max(1, int((weights > 0).sum(dim=-1).max())))


def _distinct(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(values))
