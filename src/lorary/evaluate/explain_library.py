"""How a routed library treats some prompts, and what each expert is worth to their answers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lorary.data.template import Example
from lorary.display import Display
from lorary.evaluate.explain_trace import see
from lorary.evaluate.explanation import Explanation
from lorary.evaluate.finite import finite_logits
from lorary.evaluate.loglik import answer_losses
from lorary.evaluate.prompts import Prompt
from lorary.evaluate.settings import ExplainSettings
from lorary.model.attach import routing
from lorary.model.base import Base
from lorary.model.plan import constant_weights
from lorary.model.seating import seating
from lorary.route.presets import merged
from lorary.route.setting import Routing


def explain_library(
    base: Base, prompts: Sequence[Prompt], template: str, settings: ExplainSettings | None = None
) -> Explanation:
    """See how the router in force treats prompts, and score their answers with and without experts.

    Args:
        base: the base model with the library's experts seated.
        prompts: at least one.
        template: `plain` or `chat`.
        settings: what is compared; its template is not looked at.

    Returns:
        What was seen.

    Raises:
        UsageError: if a prompt does not fit the base's positions, or no token counts.
        RouterError: if there is no such other router, or a weight or likelihood is not finite.
    """
    settings = settings or ExplainSettings()
    state = seating(base.model)
    setting, names = state.routing, state.experts
    other = None if settings.against is None else merged(setting, settings.against)
    with Display().bar("tracing", len(prompts)) as bar:
        traced = []
        for prompt in prompts:
            traced.append(see(base, prompt, template, other, settings.max_new_tokens))
            bar.advance()
    layers = traced[0].layers
    constant = constant_weights(setting, names)
    explanation = Explanation(
        library=state.library.name,
        base_model=base.files.name,
        template=template,
        router="fixed" if setting.fixed is not None else setting.router,
        settings=setting.to_json(),
        experts=names,
        layers=layers,
        reach=_reach(base.model, layers, setting),
        prompts=[each.seen for each in traced],
        fixed=None if constant is None else {n: w for n, w in zip(names, constant.tolist(), strict=True) if w},
        log_likelihood=(),
        base=(),
    )
    removed = _to_take_out(explanation, settings)
    return _scored(base, explanation, [each.example for each in traced], setting, other, removed)


def _reach(model: Any, layers: Sequence[str], setting: Routing) -> Tensor:
    """(layers, experts) bool: which experts may be chosen where."""
    state = seating(model)
    reach = torch.zeros(len(layers), len(state.experts), dtype=torch.bool)
    for i, path in enumerate(layers):
        reach[i, list(state.layers[path].experts)] = True
    reach &= torch.tensor([setting.may_choose(name) for name in state.experts])
    return reach


def _to_take_out(explanation: Explanation, settings: ExplainSettings) -> list[str]:
    """The experts that were named, else the most used ones that are used at all."""
    if settings.without is not None:
        return list(dict.fromkeys(settings.without))
    used = explanation.fixed if explanation.fixed is not None else _used(explanation)
    names = (explanation.experts[i] for i in explanation.ranked())
    return [name for name in names if used.get(name)][: settings.most]


def _used(explanation: Explanation) -> Mapping[str, float]:
    return dict(zip(explanation.experts, explanation.overall.measures.usage.tolist(), strict=True))


def _scored(
    base: Base,
    explanation: Explanation,
    examples: Sequence[Example],
    setting: Routing,
    other: Routing | None,
    removed: Sequence[str],
) -> Explanation:
    """The log-likelihood of all answers under the router, the base, the other router, and without each expert."""
    settings = {"router": setting, "base": merged(setting, "base")} | ({"other": other} if other else {})
    without = [without_expert(setting, name, explanation.experts) for name in removed]
    scores = []
    with Display().bar("scoring", len(settings) + len(removed)) as bar:
        for routed in (*settings.values(), *without):
            with routing(base.model, routed), finite_logits(base.model):
                scores.append([-loss.total for loss in answer_losses(base.model, examples)])
            bar.advance()
    by_name = dict(zip(settings, scores, strict=False))
    return replace(
        explanation,
        log_likelihood=by_name["router"],
        base=by_name["base"],
        against=(other.router, by_name["other"]) if other else None,
        without=dict(zip(removed, scores[len(settings) :], strict=True)),
    )


def without_expert(setting: Routing, name: str, experts: Sequence[str]) -> Routing:
    """The same settings without one expert; the bare base where none is left.

    Args:
        setting: a router, or fixed experts: named ones then share the weight 1 anew, given weights stay as they are.
        name: the expert.
        experts: all of them.
    """
    if setting.experts is not None:
        others = [other for other in setting.experts if other != name]
        if not others:
            return merged(setting, "base")
        is_given = isinstance(setting.experts, Mapping)
        return replace(setting, experts={n: setting.experts[n] for n in others} if is_given else others)  # type: ignore[call-overload]
    allowed = [other for other in experts if setting.may_choose(other) and other != name]
    return replace(setting, allow=allowed) if allowed else merged(setting, "base")
