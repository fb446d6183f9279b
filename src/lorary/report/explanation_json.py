"""An explanation as one JSON document; docs/explain.md names its keys."""

from collections.abc import Sequence
from typing import Any

from lorary.evaluate.explanation import Explanation, LayerGroup, SeenPrompt
from lorary.evaluate.routing import DOMINATING, DOMINATING_TIMES, HARDLY, SINK_RATIO
from lorary.lora.targets import place_of

# Six digits of a weight or an entropy: more than float32 gives.
DIGITS = 6


def explanation_json(explanation: Explanation) -> dict[str, Any]:
    """The whole explanation as values of JSON.

    Args:
        explanation: what was seen.

    Returns:
        The document; experts of weight zero are left out wherever weights or usage are listed.
    """
    e = explanation
    document: dict[str, Any] = {
        "library": e.library,
        "base_model": e.base_model,
        "template": e.template,
        "router": e.router,
        "settings": dict(e.settings),
        "decides": e.decides,
        "fixed": None if e.fixed is None else dict(e.fixed),
        "answers": {
            "num_tokens": e.num_answer,
            "log_likelihood": sum(e.log_likelihood),
            "base": e.against_base._asdict(),
        },
        "without": [without._asdict() for without in e.without_each],
        "against": None if e.against_other is None else {**e.against_other._asdict(), "compared": e.compares},
        "thresholds": {
            "sink_ratio": SINK_RATIO, "hardly_used": HARDLY,
            "dominating": DOMINATING, "dominating_times_equal": DOMINATING_TIMES,
        },
        "prompts": [_prompt(e, i) for i in range(len(e.prompts))],
    }  # fmt: skip
    return document | (_statistics(e) if e.decides else {})


def _statistics(e: Explanation) -> dict[str, Any]:
    layers = [
        {**_group(e, group), "module": place_of(group.name)[0], "depth": place_of(group.name)[1]}
        for group in e.by_layer
    ]
    experts = [
        {"name": name, **use._asdict(), "verdict": use.verdict} for name, use in zip(e.experts, e.uses, strict=True)
    ]
    left_out = sum(len(prompt.tokens) for prompt in e.prompts) - e.shares.shape[1]
    return {
        "overall": {**_group(e, e.overall), "tokens": e.shares.shape[1], "left_out": left_out},
        "experts": experts,
        "layers": layers,
        "depths": [_group(e, group) for group in e.by_depth],
        "modules": [_group(e, group) for group in e.by_module],
    }


def _group(e: Explanation, group: LayerGroup) -> dict[str, Any]:
    measures = group.measures
    used = zip(e.experts, measures.usage.tolist(), strict=True)
    usage = {name: round(value, DIGITS) for name, value in used if value}
    entropies = {"entropy": measures.entropy, "balance": measures.balance, "information": measures.information}
    return {
        "name": group.name,
        **{key: round(value, DIGITS) for key, value in entropies.items()},
        "usage": usage,
        "agreement": None if group.agreement is None else group.agreement._asdict(),
    }


def _prompt(e: Explanation, i: int) -> dict[str, Any]:
    prompt = e.prompts[i]
    return {
        "prompt": prompt.prompt,
        "answer": prompt.answer,
        "is_given": prompt.is_given,
        "is_finished": prompt.is_finished,
        "num_answer": prompt.num_answer,
        "log_likelihood": e.log_likelihood[i],
        "tokens": [token._asdict() for token in prompt.tokens],
        "weights": _weights(e.layers, prompt),
    }


def _weights(layers: Sequence[str], prompt: SeenPrompt) -> dict[str, list[list[tuple[int, float]]]]:
    """By layer: for each token the (number of the expert, weight) of those it chose."""
    if prompt.weights is None:
        return {}
    weights = zip(layers, prompt.weights.tolist(), strict=True)
    return {path: [_sparse(token) for token in tokens] for path, tokens in weights}


def _sparse(weights: list[float]) -> list[tuple[int, float]]:
    return [(expert, round(weight, DIGITS)) for expert, weight in enumerate(weights) if weight]
