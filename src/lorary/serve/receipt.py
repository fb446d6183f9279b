"""The receipt of a decision: who answers, why, and who does not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.axes import layer_number
from lorary.evaluate.decisions import Decision
from lorary.route import ROUTERS
from lorary.route.setting import Routing
from lorary.serve.engine import Traced

# Weights below it are not shown: they round to nothing.
_LEAST_WEIGHT = 5e-4

Weights = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Receipt:
    """A decision as it is told.

    Args:
        id: of the request.
        router: that was asked; `fixed` where experts were named, `base` where the base was.
        rule: that decided; another one than the router where that only picks one.
        is_fallback: whether no expert fits.
        confidence: score of the best expert; None where no rule decides for the whole request.
        threshold: the score that an expert must reach; None where there is no such bound.
        sentence: what was decided, and why.
        experts: weight of each expert that answers, the largest first; empty where the base answers, or where each
            token decides and was not looked at.
        rejected: score of each other expert, the best first.
        ms: milliseconds that the decision took.
        num_tokens: of the prompt.
        tokens: text and experts of each token, where that is asked for.
        layers: experts by group of layers, where that is asked for.
    """

    id: str
    router: str
    rule: str
    is_fallback: bool
    confidence: float | None
    threshold: float | None
    sentence: str
    experts: Weights
    rejected: Weights
    ms: float
    num_tokens: int
    tokens: tuple[tuple[str, Weights], ...] | None = field(default=None, repr=False)
    layers: tuple[tuple[str, Weights], ...] | None = field(default=None, repr=False)

    def to_json(self) -> dict[str, Any]:
        """The object that `/v1/route` answers with."""
        shown: dict[str, Any] = {
            "id": self.id,
            "router": self.router,
            "rule": self.rule,
            "is_fallback": self.is_fallback,
            "confidence": self.confidence,
            "threshold": self.threshold,
            "sentence": self.sentence,
            "experts": _weighted(self.experts),
            "rejected": [{"name": name, "score": round(score, 4)} for name, score in self.rejected],
            "ms": round(self.ms, 3),
            "num_tokens": self.num_tokens,
        }
        if self.tokens is not None:
            shown["tokens"] = [{"text": text, "experts": _weighted(weights)} for text, weights in self.tokens]
        if self.layers is not None:
            shown["layers"] = [{"group": group, "experts": _weighted(weights)} for group, weights in self.layers]
        return shown

    def headers(self) -> dict[str, str]:
        """The headers of a response; names of experts and routers are ASCII."""
        confidence = {} if self.confidence is None else {"x-lorary-confidence": f"{self.confidence:.4f}"}
        return {
            "x-lorary-router": self.router,
            "x-lorary-experts": ",".join(f"{name}={weight:.3f}" for name, weight in self.experts[:20]),
            **confidence,
            "x-lorary-ms": f"{self.ms:.1f}",
        }

    @property
    def winner(self) -> str:
        """The expert with the largest weight, or the base."""
        return self.experts[0][0] if self.experts else "base"


def decided_receipt(
    request_id: str, setting: Routing, decision: Decision, ms: float, num_tokens: int, *, pinned: bool = False
) -> Receipt:
    """The receipt of a decision for a whole request.

    Args:
        request_id: of the request.
        setting: that decided.
        decision: what was decided.
        ms: milliseconds that it took.
        num_tokens: of the prompt.
        pinned: whether it is that of an earlier request of the same session.
    """
    experts = _sorted(decision.weights)
    chosen = {name for name, _ in experts}
    sentence = decision.sentence(setting)
    return Receipt(
        request_id, setting.router, decision.rule, decision.is_lost, decision.confidence, setting.choosing.threshold,
        f"pinned to the first decision of the session: {sentence}" if pinned else sentence, experts,
        _sorted([pair for pair in decision.scores if pair[0] not in chosen]), ms, num_tokens,
    )  # fmt: skip


def undecided_receipt(
    request_id: str, setting: Routing, experts: Sequence[str], num_tokens: int, *, traced: Traced | None, ms: float
) -> Receipt:
    """The receipt where no rule decides for the whole request: experts are named, all answer, or each token decides.

    Args:
        request_id: of the request.
        setting: who answers.
        experts: all that are seated.
        num_tokens: of the prompt.
        traced: how its tokens were routed, where that was looked at.
        ms: milliseconds that it took to look.
    """
    weights: Weights = ()
    fixed = constant_weights(setting, experts)
    if fixed is not None:
        weights = _sorted(fixed.items())
        sentence = _constant_sentence(setting, weights)
    else:
        sentence = f"{setting.router}: each token chooses its experts, once per {setting.decides}"
        if traced is not None and traced.layers:
            weights = _shown(traced.weights.mean(dim=(0, 1)), traced.experts)
            best = ", ".join(f"{name} {weight:.0%}" for name, weight in weights[:3])
            sentence = f"{sentence} (mean over the prompt: {best})"
    chosen = {name for name, _ in weights}
    rejected = [(name, 0.0) for name in experts if name not in chosen] if traced is not None else []
    router = "fixed" if setting.fixed is not None else setting.router
    return Receipt(
        request_id, router, router, False, None, setting.choosing.threshold, sentence, weights, tuple(rejected), ms,
        num_tokens,
    )  # fmt: skip


def constant_weights(setting: Routing, experts: Sequence[str]) -> dict[str, float] | None:
    """Weight by expert where nothing is decided: experts are named, or the rule looks at nothing; else None."""
    if setting.fixed is not None:
        return setting.fixed
    rule = ROUTERS[setting.router]
    if rule.weights is None:
        return None
    allowed = [name for name in experts if setting.may_choose(name)]
    weights = rule.weights(allowed).tolist()
    return {name: weight for name, weight in zip(allowed, weights, strict=True) if weight}


def traced_tokens(
    traced: Traced, texts: Sequence[str], constant: Mapping[str, float]
) -> tuple[tuple[str, Weights], ...]:
    """The experts of each token, as the mean over layers.

    Args:
        traced: how the tokens were routed.
        texts: of the tokens.
        constant: weights of all tokens, where no token decides.
    """
    if not traced.layers:
        same = _sorted(constant.items())
        return tuple((text, same) for text in texts)
    mean = traced.weights.mean(dim=0)
    return tuple((text, _shown(weights, traced.experts)) for text, weights in zip(texts, mean, strict=True))


def traced_layers(traced: Traced, constant: Mapping[str, float]) -> tuple[tuple[str, Weights], ...]:
    """The experts of each transformer layer, as the mean over its modules and all tokens; arguments as above."""
    if not traced.layers:
        return (("all layers", _sorted(constant.items())),)
    groups: dict[str, list[int]] = {}
    for place, path in enumerate(traced.layers):
        number = layer_number(path)
        groups.setdefault(path if number is None else f"layer {number}", []).append(place)
    mean = traced.weights.mean(dim=1)
    return tuple((group, _shown(mean[places].mean(dim=0), traced.experts)) for group, places in groups.items())


def no_trace() -> Traced:
    """What there is to see where no token decides."""
    return Traced((), (), torch.zeros(0, 0, 0))


def _constant_sentence(setting: Routing, weights: Weights) -> str:
    if not weights:
        return "base: no expert is used"
    named = ", ".join(f"{name} {weight:.0%}" for name, weight in weights[:3])
    more = f" and {len(weights) - 3} more" if len(weights) > 3 else ""
    return f"{'named' if setting.fixed is not None else setting.router}: {named}{more}"


def _shown(weights: Float[Tensor, " experts"], experts: Sequence[str]) -> Weights:
    pairs = zip(experts, weights.tolist(), strict=True)
    return _sorted([(name, weight) for name, weight in pairs if abs(weight) >= _LEAST_WEIGHT])


def _sorted(pairs: Any) -> Weights:
    return tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))


def _weighted(weights: Weights) -> list[dict[str, Any]]:
    return [{"name": name, "weight": round(weight, 4)} for name, weight in weights]
