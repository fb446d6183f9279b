"""One routed prompt whose answer is right, as HTML: what a reader sees before any table."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from lorary.evaluate.routed_prompt import RoutedPrompt
from lorary.report.markup import counted
from lorary.report.shell import part
from lorary.report.tokens import NUM_COLOURS, colour_of, named_weights, visible


def example(routings: Sequence[RoutedPrompt]) -> Markup:
    """The first traced prompt whose answer is right; nothing where there is none."""
    routed = next((routed for routed in routings if routed.is_right), None)
    if routed is None:
        return Markup("")
    means = routed.weights.float().mean(dim=0)  # (tokens, experts)
    order = means.sum(dim=0).argsort(descending=True, stable=True).tolist()
    rank = {expert: place for place, expert in enumerate(order)}
    peak = float(means.max()) or 1.0
    tokens: list[dict[str, Any]] = []
    for text, weights in zip(routed.tokens, means.tolist(), strict=True):
        best = max(range(len(weights)), key=lambda expert: weights[expert])
        tokens.append({
            "text": visible(text),
            "colour": colour_of(rank[best]) if weights[best] > 0 else "",
            "weight": f"{weights[best] / peak:.2f}",
            "title": named_weights(routed.experts, weights),
            "rank": rank[best],
        })  # fmt: skip
    leading = sorted({token["rank"] for token in tokens if token["colour"]})
    legend = [(routed.experts[order[place]], colour_of(place)) for place in leading if place < NUM_COLOURS]
    if num_others := len(leading) - len(legend):
        legend.append((counted(num_others, "other"), colour_of(NUM_COLOURS)))
    return part("evaluation.html", "example", routed, legend, tokens)
