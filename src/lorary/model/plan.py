"""One routing setting, made ready for the experts that are seated: a gate or fixed weights for each layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorary.errors import RouterError, UsageError
from lorary.lora.context import PerThread
from lorary.model.decision import Request, TokenDecision
from lorary.model.features import Featured, embedding, featured
from lorary.model.gates import ScoreGate, TokenGate
from lorary.model.general_subtraction import Subtracted
from lorary.model.layers import SeatedLayer, late_layer, more_than_factors
from lorary.model.prepared import REQUEST, PreparedTensors
from lorary.model.row_gates import RequestGate
from lorary.model.row_settings import prepared_tensors, score_rows_for
from lorary.model.seated import Seated
from lorary.model.seating import Seating
from lorary.model.yardstick import data_for
from lorary.route import ROUTERS
from lorary.route.fixed import fixed_weights
from lorary.route.rule import Measures
from lorary.route.setting import CHAT, UNIFORM, Routing

# Which part of prompts that belong to no expert lies below the border.
UNFIT = 0.5


@dataclass
class Plan:
    """One setting, made ready: a gate or fixed weights for each layer."""

    gates: dict[str, nn.Module | Tensor]
    requests: PerThread[Request] | None = None
    decisions: PerThread[TokenDecision] | None = None


def make_plan(setting: Routing, state: Seating, model: Any, without: Mapping[str, Subtracted]) -> Plan:
    """Make a setting ready for the experts that are seated.

    Args:
        setting: of one row or of all.
        state: the experts.
        model: that they are seated in.
        without: by path of a layer, what general experts take away there.

    Raises:
        RouterError: if the setting cannot be used over these experts.
        UsageError: if it names layers that are not routed.
    """
    check_setting(setting, state)
    weights = constant_weights(setting, state.experts)
    if weights is not None:
        return Plan({path: weights[list(layer.experts)] for path, layer in state.layers.items()})
    if setting.decides != "layer" and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        # Encoder and decoder see other tokens, although there may be as many of them.
        raise RouterError(
            f"per='{setting.decides}' needs a decoder-only model", found=type(model).__name__, remedy="per='layer'"
        )
    is_picked, setting = bool(ROUTERS[setting.router].tries), settled(setting, state, model)
    prepared = data_for(setting, state, model)
    if ROUTERS[setting.router].request is not None:
        embed = embedding(setting, model, state.tokenizer)
        alive = torch.zeros(len(state.experts), dtype=torch.bool)
        for layer in state.layers.values():
            alive[list(layer.experts)] |= layer.alive.cpu()
        by = featured(setting, embed, state.library, state.experts, alive, prepared)
        return _request_plan(_requests(setting, state, featured=by), state, {})
    scored = _score_gates(setting, state, without, prepared)
    if setting.decides == "token":
        decisions = PerThread(TokenDecision)
        return Plan(dict(_token_gates(setting, state, scored, decisions)), decisions=decisions)
    if setting.decides == "request":
        measures = ROUTERS[setting.router].measures
        at = setting.at or late_layer(list(state.layers))
        measured = {at: scored[at]} if measures == "last" else scored
        border = _border(setting, state, prepared) if is_picked else 0.0
        return _request_plan(_requests(setting, state, measures, border=border), state, measured)
    return Plan(dict(scored))


def settled(setting: Routing, state: Seating, model: Any) -> Routing:
    """The setting that acts: that of the first rule which has all its data, for a rule that only picks another.

    Args:
        setting: of any router.
        state: the experts.
        model: that they are seated in.
    """
    names = ROUTERS[setting.router].tries
    for name in names[:-1]:
        candidate = setting.changed(router=name)
        if set(state.experts) <= set(data_for(candidate, state, model)):
            return candidate
    return setting.changed(router=names[-1]) if names else setting


def _requests(
    setting: Routing,
    state: Seating,
    measures: Measures = "mean",
    *,
    featured: Featured | None = None,
    border: float = 0.0,
) -> PerThread[Request]:
    choice, experts, fallback = setting.choice(""), len(state.experts), fallback_weights(setting, state.experts)
    evidence = state.evidence if setting.fallback == CHAT else None
    return PerThread(partial(Request, experts, choice, measures, featured, setting.router, border, fallback, evidence))


def fallback_weights(setting: Routing, experts: Sequence[str]) -> Tensor | None:
    """(experts,) weights for a request in which no expert reaches the threshold; the base answers where None."""
    if setting.fallback in (UNIFORM, CHAT):
        return constant_weights(Routing(UNIFORM, allow=setting.allow, general=setting.general), experts)
    return None if setting.fallback is None else constant_weights(Routing(experts=[setting.fallback]), experts)


def _border(setting: Routing, state: Seating, prepared: PreparedTensors) -> float:
    """What the best expert scores on half of the prompts that ship with the package, where these gave the moments.

    They belong to no expert, so this is how a request looks that nothing fits. Half of them and not most: without
    prompts of the experts' own, letting a good expert go is the greater loss.
    """
    scores = [prepared.get(name, {}).get(REQUEST) for name in state.experts if setting.may_choose(name)]
    known = [score for score in scores if score is not None]
    if not known or len(known) < len(scores):
        return 0.0
    return float(torch.stack(known).amax(dim=0).double().quantile(UNFIT))


def _request_plan(requests: PerThread[Request], state: Seating, measured: Mapping[str, ScoreGate]) -> Plan:
    gates = {
        path: RequestGate(requests, Seated(layer.experts, len(state.experts)), measured.get(path))
        for path, layer in state.layers.items()
    }
    return Plan(dict(gates), requests)


def constant_weights(setting: Routing, experts: Sequence[str]) -> Tensor | None:
    """(experts,) weights of a setting that looks at nothing, None for one that decides by what it sees."""
    if setting.fixed is not None:
        return fixed_weights(experts, setting.fixed)
    rule = ROUTERS[setting.router]
    if rule.weights is None:
        return None
    allowed = [name for name in experts if setting.may_choose(name)]
    return fixed_weights(experts, dict(zip(allowed, rule.weights(allowed).tolist(), strict=True)))


def _score_gates(
    setting: Routing, state: Seating, without: Mapping[str, Subtracted], prepared: PreparedTensors
) -> dict[str, ScoreGate]:
    rule = ROUTERS[setting.router]
    score_rows = score_rows_for(setting, rule, state.library, state.experts, state.layers, prepared)
    if "score_rows" in rule.reads and rule.needs != "prepared":
        score_rows.update({path: subtracted.score_rows for path, subtracted in without.items()})
    calibration: Mapping[str, Tensor] = {}
    if setting.is_calibrated:
        calibration = prepared_tensors(setting, state.library, state.experts, state.layers, prepared)
    input_norm = rule.input_norm if setting.options.input_norm == "none" else setting.options.input_norm
    gates = {}
    for path, layer in state.layers.items():
        names = [state.experts[position] for position in layer.experts]
        allowed, subtracted = torch.tensor([setting.may_choose(name) for name in names]), without.get(path)
        if subtracted is not None:
            allowed &= subtracted.score_rows.any(dim=1).cpu()
        gates[path] = ScoreGate(
            rule, layer, setting.choice(path), allowed,
            input_norm=input_norm, candidates=setting.options.candidates,
            score_rows=score_rows.get(path), blocks=None if subtracted is None else subtracted.blocks,
            calibration=calibration.get(path),
        )  # fmt: skip
    return gates


def _token_gates(
    setting: Routing, state: Seating, scored: Mapping[str, ScoreGate], decisions: PerThread[TokenDecision]
) -> dict[str, TokenGate]:
    num_experts = len(state.experts)
    return {
        path: TokenGate(
            decisions, path, Seated(layer.experts, num_experts), scored[path] if setting.at in (None, path) else None,
            setting.choice("").most(num_experts),
        )
        for path, layer in state.layers.items()
    }  # fmt: skip


def check_setting(setting: Routing, state: Seating) -> None:
    """Refuse factors that cannot be mixed, and experts and layers that are not there.

    Args:
        setting: of one row or of all.
        state: the experts.

    Raises:
        RouterError: if the setting cannot be used over these experts.
        UsageError: if it names layers that are not routed.
    """
    _check_mix(setting, state.layers)
    fallback = [] if setting.fallback in (None, UNIFORM, CHAT) else [str(setting.fallback)]
    for role, names in (("allowed experts", setting.allow or ()), ("the expert to fall back on", fallback)):
        if missing := [name for name in names if name not in state.experts]:
            raise RouterError(f"{role} must be seated", found=missing, remedy=f"it has {list(state.experts)}")
    if setting.at is not None and setting.at not in state.layers:
        raise UsageError("at must name a routed layer", found=setting.at, remedy=f"one of {list(state.layers)}")
    temperature = setting.choosing.temperature
    if isinstance(temperature, Mapping):
        numbers = {part for path in state.layers for part in path.split(".") if part.isdigit()}
        unknown = [key for key in temperature if str(key) not in state.layers and str(key) not in numbers]
        if unknown:
            raise UsageError("temperatures must be for routed layers, by path or number", found=unknown)


def _check_mix(routing: Routing, layers: Mapping[str, SeatedLayer]) -> None:
    """Refuse to mix factors of unequal ranks, where there is no matrix to average, and experts that are more."""
    if routing.mix != "factors":
        return
    for path, layer in layers.items():
        if layer.lora.has_beside:
            raise more_than_factors("mixing factors", path, "mix='outputs'")
        if len(ranks := set(layer.ranks)) > 1:
            raise RouterError(
                f"mixing factors needs experts of one rank, at layer '{path}' too",
                found=f"ranks {sorted(ranks)}",
                remedy="mix='outputs'",
            )
