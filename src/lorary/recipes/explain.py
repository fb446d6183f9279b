"""`lorary explain`: how a routed library treats some prompts, and what each expert is worth to their answers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lorary.data.template import Example
from lorary.display import Display
from lorary.errors import UsageError, did_you_mean
from lorary.evaluate.completion import check_text
from lorary.evaluate.explain_trace import Prompt, see
from lorary.evaluate.explanation import Explanation
from lorary.evaluate.finite import finite_logits
from lorary.evaluate.loglik import answer_losses
from lorary.library.opening import base_of, template_of
from lorary.library.store import Library
from lorary.model.attach import attach, routing
from lorary.model.base import Base, load_base
from lorary.model.plan import constant_weights
from lorary.model.seating import seating
from lorary.numbers import check_count
from lorary.recipes.base_options import BaseOptions
from lorary.route.presets import merged
from lorary.route.setting import Routing


def run_explain(
    library_path: str,
    prompts: Sequence[Prompt],
    *,
    against: str | None = None,
    without: Sequence[str] | None = None,
    most: int = 8,
    template: str | None = None,
    max_new_tokens: int = 32,
    load: BaseOptions | None = None,
    **route: Any,
) -> Explanation:
    """Load a library and its base, and see how prompts are routed.

    Args:
        library_path: folder of the library.
        prompts: at least one.
        against: another router to compare with, under the same settings.
        without: experts to take out, one at a time; the most used ones where None.
        most: how many of the most used, 0 for none.
        template: `plain` or `chat`; the experts' own where None.
        max_new_tokens: most tokens of an answer that is not given.
        load: the base model; the library's own where None.
        route: router, experts, preset and fields of a routing setting, as `lorary.attach` takes them.

    Returns:
        What was seen.

    Raises:
        UsageError: if a text is empty or too long, an option is out of range, or an expert is not there.
        LoraryError: as for `lorary.attach`.
    """
    load = load or BaseOptions()
    _check_options(prompts, route.get("experts"), most, max_new_tokens)
    library = Library.open(library_path)
    name = template_of(library, template)
    _check_names(library, without or [])
    loaded = load_base(base_of(library, load.base), dtype=load.dtype, device=load.device)
    attach(loaded.model, library, tokenizer=loaded.tokenizer, force_base=load.force_base, **route)
    return explain(
        loaded, prompts, name, against=against, without=without, most=most, max_new_tokens=max_new_tokens,
    )  # fmt: skip


def explain(
    base: Base,
    prompts: Sequence[Prompt],
    template: str,
    *,
    against: str | None = None,
    without: Sequence[str] | None = None,
    most: int = 8,
    max_new_tokens: int = 32,
) -> Explanation:
    """See how the router in force treats prompts; `base` has experts seated, the rest is as for `run_explain`."""
    state = seating(base.model)
    setting, names = state.routing, state.experts
    alternative = None if against is None else merged(setting, against)
    display = Display()
    with display.bar("tracing", len(prompts)) as bar:
        traces = []
        for prompt in prompts:
            traces.append(see(base, prompt, template, alternative, max_new_tokens))
            bar.advance()
    layers = traces[0].layers
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
        prompts=[trace.seen for trace in traces],
        fixed=None if constant is None else {n: w for n, w in zip(names, constant.tolist(), strict=True) if w},
        log_likelihood=(),
        base=(),
    )
    return _scored(
        base,
        explanation,
        [trace.example for trace in traces],
        setting,
        alternative,
        _to_take_out(explanation, without, most),
    )


def _reach(model: Any, layers: Sequence[str], setting: Routing) -> Tensor:
    """(layers, experts) bool: which experts may be chosen where."""
    state = seating(model)
    reach = torch.zeros(len(layers), len(state.experts), dtype=torch.bool)
    for i, path in enumerate(layers):
        reach[i, list(state.layers[path].experts)] = True
    reach &= torch.tensor([setting.may_choose(name) for name in state.experts])
    return reach


def _to_take_out(explanation: Explanation, without: Sequence[str] | None, most: int) -> list[str]:
    """The experts that were named, else the most used ones that are used at all."""
    if without is not None:
        return list(dict.fromkeys(without))
    used = explanation.fixed if explanation.fixed is not None else _used(explanation)
    return [explanation.experts[i] for i in explanation.ranked() if used.get(explanation.experts[i])][:most]


def _used(explanation: Explanation) -> Mapping[str, float]:
    return dict(zip(explanation.experts, explanation.overall.measures.usage.tolist(), strict=True))


def _scored(
    base: Base,
    explanation: Explanation,
    examples: Sequence[Example],
    setting: Routing,
    alternative: Routing | None,
    names: Sequence[str],
) -> Explanation:
    """The log-likelihood of all answers under the router, the base, the other router, and without each expert."""
    settings = {"router": setting, "base": merged(setting, "base")} | ({"other": alternative} if alternative else {})
    taken_out = [without_expert(setting, name, explanation.experts) for name in names]
    scores = []
    with Display().bar("scoring", len(settings) + len(names)) as bar:
        for variant in (*settings.values(), *taken_out):
            with routing(base.model, variant), finite_logits(base.model):
                scores.append([-loss.total for loss in answer_losses(base.model, examples)])
            bar.advance()
    by_name = dict(zip(settings, scores, strict=False))
    return replace(
        explanation,
        log_likelihood=by_name["router"],
        base=by_name["base"],
        against=(alternative.router, by_name["other"]) if alternative else None,
        without=dict(zip(names, scores[len(settings) :], strict=True)),
    )


def without_expert(setting: Routing, name: str, experts: Sequence[str]) -> Routing:
    """The same settings without one expert; the bare base where none is left.

    Args:
        setting: a router, or fixed experts: named ones then share the weight 1 anew, given weights stay as they are.
        name: the expert.
        experts: all of them.
    """
    if setting.experts is not None:
        remaining = [expert for expert in setting.experts if expert != name]
        if not remaining:
            return merged(setting, "base")
        is_given = isinstance(setting.experts, Mapping)
        return replace(setting, experts={n: setting.experts[n] for n in remaining} if is_given else remaining)  # type: ignore[call-overload]
    allowed = [expert for expert in experts if setting.may_choose(expert) and expert != name]
    return replace(setting, allow=allowed) if allowed else merged(setting, "base")


def _check_options(prompts: Sequence[Prompt], experts: Sequence[str] | None, most: int, max_new_tokens: int) -> None:
    if not prompts:
        raise UsageError("there must be a prompt to explain", found="none", remedy="--prompt TEXT or --prompts FILE")
    for prompt in prompts:
        check_text(prompt.text, "--prompt")
        if prompt.answer is not None:
            check_text(prompt.answer, "--answer")
    if experts is not None and not experts:
        raise UsageError("--experts must name an expert", found="none", remedy="--router base uses no expert")
    check_count("--max-new-tokens", max_new_tokens)
    check_count("--most", most, least=0)


def _check_names(library: Library, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in library.names()]
    if missing:
        raise UsageError(
            "--without must name experts of the library",
            found=missing,
            remedy=did_you_mean(missing[0], library.names(), remedy=f"it has {library.names()}"),
        )
