"""What `attach` leaves on a model, and how the settings in force reach every routed layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorary.adapter import Adapter
from lorary.errors import RouterError, UsageError
from lorary.library.store import Library
from lorary.model.decision import Request, TokenDecision
from lorary.model.features import decoder_of, embedding, featured
from lorary.model.gates import ScoreGate, Seated, TokenGate
from lorary.model.general import Subtracted, subtract_general
from lorary.model.layers import SeatedLayer, late_layer
from lorary.model.prepared import Known, read_missing
from lorary.model.probe import Prober
from lorary.model.row_gates import FixedGate, RequestGate, RowGate
from lorary.model.rows import prepared_tensors, rows_for
from lorary.model.setting import Routing
from lorary.route import ROUTERS
from lorary.route.arrow import AMBIGUOUS_GAP
from lorary.route.fixed import fixed_weights

STATE = "_lorary"


@dataclass
class Seating:
    """What `attach` leaves on a model.

    Args:
        experts: names, in canonical order.
        layers: the routed layers, in the model's order.
        handles: of the hooks of `layers`.
        routing: the router in force, or the one that the rows' settings change.
        library: where the experts came from.
        seats: names in the order of their seats: fresh ones as `experts`, those that came live behind them.
        rows: one setting per row of a batch, where they were given one by one.
        prepared: what rules need beyond weights, by kind; read from the library when a setting first needs it.
        live: experts that came live and are not the library's.
        num_blocks: how many `with lorary.routing` blocks are open.
        tokenizer: of the base, for rules that read text; None where it was not given.
        prober: decides for requests, where a setting asks for that.
        pass_handles: of the hooks that run when a pass of the decoder begins.
    """

    experts: tuple[str, ...]
    layers: dict[str, SeatedLayer]
    handles: dict[str, RemovableHandle]
    routing: Routing
    library: Library
    seats: tuple[str, ...]
    rows: tuple[Routing, ...] | None = None
    prepared: dict[str, Known] = field(default_factory=dict)
    live: dict[str, Adapter] = field(default_factory=dict)
    num_blocks: int = 0
    tokenizer: Any = None
    prober: Prober | None = None
    pass_handles: list[RemovableHandle] = field(default_factory=list)

    def ambiguous(self) -> list[tuple[str, str, float]]:
        """(expert, layer, σ2/σ1) of every prototype whose direction is not well defined."""
        return [
            (self.experts[expert], path, float(ratio))
            for path, layer in self.layers.items()
            for expert, ratio in zip(layer.experts, layer.gap, strict=True)
            if ratio > AMBIGUOUS_GAP
        ]


def seating(model: Any) -> Seating:
    """What `attach` left on a model.

    Raises:
        UsageError: if no experts are seated in it.
    """
    state = getattr(model, STATE, None)
    if state is None:
        raise UsageError("the model must be a routed one", found=type(model).__name__, remedy="lorary.attach")
    assert isinstance(state, Seating)
    return state


def prober_of(model: Any) -> Prober | None:
    """What decides for requests in a model; None for one that is bare, or decides otherwise."""
    state = getattr(model, STATE, None)
    return None if state is None else seating(model).prober


def has_row_settings(model: Any) -> bool:
    """Whether the rows of a batch have settings of their own, so that their number and order say which is whose."""
    state = getattr(model, STATE, None)
    return state is not None and seating(model).rows is not None


def apply_routing(model: Any, state: Seating, routing: Routing, rows: Sequence[Routing] | None = None) -> None:
    """Hand settings to every routed layer and put them in force; on failure those in force stay.

    Args:
        model: that the experts are seated in.
        state: its seating, or the one it is about to get.
        routing: for all rows, or what `rows` were made from.
        rows: one setting per row.

    Raises:
        RouterError: if a setting cannot be used over these experts.
        UsageError: if it names layers that are not routed.
    """
    different: list[Routing] = []
    for setting in rows or [routing]:
        if setting not in different:
            different.append(setting)
    if len({setting.mix for setting in different}) > 1:
        raise RouterError("the settings of one batch must share one mix", found=sorted({s.mix for s in different}))
    if len({(*(setting.general or ()), setting.general_mode) for setting in different}) > 1:
        raise RouterError(
            "the settings of one batch must share their general experts", found=[s.general for s in different]
        )
    without = subtract_general(different[0], state.experts, state.layers)
    plans = [_plan(setting, state, model, without) for setting in different]
    of_row = [different.index(setting) for setting in rows or [routing]]
    for path, layer in state.layers.items():
        own = [plan.gates[path] for plan in plans]
        general = without[path].module if path in without else None
        if rows is None and general is None and isinstance(own[0], Tensor):
            layer.lora.fix(own[0], routing.mix)
            continue
        gates = [FixedGate(gate.to(layer.lora.up)) if isinstance(gate, Tensor) else gate for gate in own]
        gate = gates[0] if rows is None else RowGate(gates, of_row)
        layer.lora.route_by(_on(gate, layer), different[0].mix, general)
    state.routing, state.rows = routing, None if rows is None else tuple(rows)
    _set_pass_hooks(model, state, plans, of_row)


def drop_pass_hooks(state: Seating) -> None:
    """Take the hooks away that run when a pass begins."""
    for handle in state.pass_handles:
        handle.remove()
    state.prober, state.pass_handles = None, []


def _set_pass_hooks(model: Any, state: Seating, plans: "Sequence[_Plan]", of_row: Sequence[int]) -> None:
    drop_pass_hooks(state)
    # The decoder and not the model: its head and loss play no part, and it may be called without them.
    decoder = decoder_of(model)
    for plan in plans:
        if plan.decision is not None:
            state.pass_handles.append(decoder.register_forward_pre_hook(plan.decision.clear))
    if any(plan.request is not None for plan in plans):
        state.prober = Prober([plan.request for plan in plans], of_row)
        state.pass_handles.append(decoder.register_forward_pre_hook(state.prober, with_kwargs=True))
        state.pass_handles.append(model.register_forward_pre_hook(state.prober.note, with_kwargs=True))


@dataclass
class _Plan:
    """One setting, made ready: a gate or fixed weights for each layer."""

    gates: dict[str, nn.Module | Tensor]
    request: Request | None = None
    decision: TokenDecision | None = None


def _plan(setting: Routing, state: Seating, model: Any, without: Mapping[str, Subtracted]) -> _Plan:
    _check_mix(setting, state.layers)
    _check_names(setting, state)
    weights = constant_weights(setting, state.experts)
    if weights is not None:
        return _Plan({path: weights[list(layer.experts)] for path, layer in state.layers.items()})
    if setting.decides != "layer" and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        # Encoder and decoder see other tokens, although there may be as many of them.
        raise RouterError(
            f"per='{setting.decides}' needs a decoder-only model", found=type(model).__name__, remedy="per='layer'"
        )
    known = read_missing(setting, state.library, state.experts, state.layers, state.live, state.prepared)
    if ROUTERS[setting.router].request is not None:
        embed = embedding(setting, model, state.tokenizer)
        by = featured(setting, embed, state.library, state.experts, state.layers, known)
        return _request_plan(Request(len(state.experts), setting.choice(""), featured=by), state, {})
    scored = _score_gates(setting, state, without, known)
    if setting.decides == "token":
        decision = TokenDecision()
        return _Plan(dict(_token_gates(setting, state, scored, decision)), decision=decision)
    if setting.decides == "request":
        measures = ROUTERS[setting.router].measures
        at = setting.at or late_layer(list(state.layers))
        measured = {at: scored[at]} if measures == "last" else scored
        return _request_plan(Request(len(state.experts), setting.choice(""), measures), state, measured)
    return _Plan(dict(scored))


def _request_plan(request: Request, state: Seating, measured: Mapping[str, ScoreGate]) -> _Plan:
    gates = {
        path: RequestGate(request, Seated(layer.experts, len(state.experts)), measured.get(path))
        for path, layer in state.layers.items()
    }
    return _Plan(dict(gates), request)


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
    setting: Routing, state: Seating, without: Mapping[str, Subtracted], prepared: Known
) -> dict[str, ScoreGate]:
    rule = ROUTERS[setting.router]
    rows = rows_for(setting, rule, state.library, state.experts, state.layers, prepared)
    if "rows" in rule.reads and rule.needs != "prepared":
        rows.update({path: known.rows for path, known in without.items()})
    calibration: Mapping[str, Tensor] = {}
    if setting.is_calibrated:
        calibration = prepared_tensors(setting, state.library, state.experts, state.layers, prepared)
    input_norm = rule.input_norm if setting.input_norm == "none" else setting.input_norm
    gates = {}
    for path, layer in state.layers.items():
        names = [state.experts[position] for position in layer.experts]
        allowed, known = torch.tensor([setting.may_choose(name) for name in names]), without.get(path)
        if known is not None:
            allowed &= known.rows.any(dim=1).cpu()
        gates[path] = ScoreGate(
            rule, layer, setting.choice(path), allowed,
            input_norm=input_norm, candidates=setting.candidates,
            rows=rows.get(path), blocks=None if known is None else known.blocks, calibration=calibration.get(path),
        )  # fmt: skip
    return gates


def _token_gates(
    setting: Routing, state: Seating, scored: Mapping[str, ScoreGate], decision: TokenDecision
) -> dict[str, TokenGate]:
    num_experts = len(state.experts)
    return {
        path: TokenGate(
            decision, path, Seated(layer.experts, num_experts), scored[path] if setting.at in (None, path) else None,
            setting.choice("").most(num_experts),
        )
        for path, layer in state.layers.items()
    }  # fmt: skip


def _on(gate: Any, layer: SeatedLayer) -> Any:
    return gate.to(layer.lora.up.device)


def _check_names(setting: Routing, state: Seating) -> None:
    """Refuse experts and layers that are not there."""
    missing = [name for name in setting.allow or () if name not in state.experts]
    if missing:
        raise RouterError("allowed experts must be seated", found=missing, remedy=f"it has {list(state.experts)}")
    if setting.at is not None and setting.at not in state.layers:
        raise UsageError("at must name a routed layer", found=setting.at, remedy=f"one of {list(state.layers)}")
    if isinstance(setting.temperature, Mapping):
        numbers = {part for path in state.layers for part in path.split(".") if part.isdigit()}
        unknown = [key for key in setting.temperature if str(key) not in state.layers and str(key) not in numbers]
        if unknown:
            raise UsageError("temperatures must be for routed layers, by path or number", found=unknown)


def _check_mix(routing: Routing, layers: Mapping[str, SeatedLayer]) -> None:
    """Refuse to mix factors of unequal ranks: there is no matrix to average."""
    if routing.mix != "factors":
        return
    for path, layer in layers.items():
        if len(ranks := set(layer.ranks)) > 1:
            raise RouterError(
                f"mixing factors needs experts of one rank, at layer '{path}' too",
                found=f"ranks {sorted(ranks)}",
                remedy="mix='outputs'",
            )
