"""A traced prompt, packed so that 200 tokens, 210 layers and 256 experts stay a small page.

A *view* is the mean routing over some layers: one module kind at one depth, a kind at all depths, all kinds at one
depth, or everything. Each view keeps its strongest experts per token, the spread of its weights and its usage.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.evaluate.routed_prompt import RoutedPrompt
from lorary.lora.targets import place_of
from lorary.report.plots import packed

# Experts kept per token and view: all of them for the usual top_k of 4.
NUM_KEPT = 4
WEIGHT_PARTS = 255
# The effective number of experts is stored in hundredths, usage in ten-thousandths; both fit two bytes.
SPREAD_PARTS = 100
USAGE_PARTS = 10_000
ALL = "all"


def routing_plot(routed: RoutedPrompt) -> dict[str, Any]:
    """One traced prompt as a JSON document.

    Args:
        routed: the prompt; at most 65536 experts.

    Returns:
        Texts as they are; `views` maps kind and depth to a row of the packed arrays, None where no layer is such.
    """
    places = [place_of(path) for path in routed.layers]
    kinds, depths = _axis([kind for kind, _ in places]), _axis([depth for _, depth in places])
    views: list[list[int | None]] = []
    summaries: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for kind in kinds:
        views.append([])
        for depth in depths:
            inside = [i for i, (k, d) in enumerate(places) if kind in (ALL, k) and depth in (ALL, d)]
            views[-1].append(len(summaries) if inside else None)
            if inside:
                summaries.append(_summary_of_view(routed.weights[inside].float().mean(dim=0)))
    ids, weights, spread, usage = (torch.stack(parts).cpu() for parts in zip(*summaries, strict=True))
    return {
        "prompt": routed.prompt,
        "answer": routed.answer,
        "right": routed.is_right if routed.references else None,
        "tokens": list(routed.tokens),
        "experts": list(routed.experts),
        "kinds": kinds,
        "depths": depths,
        "views": views,
        "kept": ids.shape[-1],
        "ids": packed(ids.numpy(), "<u2"),
        "weights": packed((weights * WEIGHT_PARTS).round().clamp(0, WEIGHT_PARTS).numpy(), "<u1"),
        "spread": packed((spread * SPREAD_PARTS).round().clamp(0, 65535).numpy(), "<u2"),
        "usage": packed((usage * USAGE_PARTS).round().clamp(0, USAGE_PARTS).numpy(), "<u2"),
        "parts": {"weights": WEIGHT_PARTS, "spread": SPREAD_PARTS, "usage": USAGE_PARTS},
    }


def _summary_of_view(weights: Float[Tensor, "tokens experts"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is kept of one view.

    Args:
        weights: routing weights.

    Returns:
        Strongest experts and their weights, both (tokens, kept); the effective number of experts of each token,
        exp of the entropy of its weights, 0 where all are zero; usage, the mean weight of each expert.
    """
    values, ids = weights.topk(min(NUM_KEPT, weights.shape[1]))
    total = weights.sum(dim=1)
    share = weights / total.clamp_min(torch.finfo(weights.dtype).tiny)[:, None]
    spread = torch.where(total > 0, torch.special.entr(share).sum(dim=1).exp(), 0.0)
    return ids, values, spread, weights.mean(dim=0)


def _axis(values: list[str]) -> list[str]:
    """The distinct values, led by `all` where there are several."""
    distinct = list(dict.fromkeys(values))
    return [ALL, *distinct] if len(distinct) > 1 else distinct
