"""How the settings in force reach every routed layer."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lorary.errors import RouterError
from lorary.model.features import decoder_of
from lorary.model.general_subtraction import subtract_general
from lorary.model.layers import SeatedLayer
from lorary.model.plan import Plan, make_plan
from lorary.model.prefill import STEP, Prefill
from lorary.model.probe import Prober
from lorary.model.row_gates import FixedGate, RowGate
from lorary.model.seating import Seating
from lorary.route.setting import Routing


def apply_routing(model: Any, state: Seating, routing: Routing, row_settings: Sequence[Routing] | None = None) -> None:
    """Hand settings to every routed layer and put them in force; on failure those in force stay.

    Args:
        model: that the experts are seated in.
        state: its seating, or the one it is about to get.
        routing: for all rows, or what `row_settings` were made from.
        row_settings: one setting per row.

    Raises:
        RouterError: if a setting cannot be used over these experts.
        UsageError: if it names layers that are not routed.
    """
    different: list[Routing] = []
    for setting in row_settings or [routing]:
        if setting not in different:
            different.append(setting)
    if len({setting.mix for setting in different}) > 1:
        raise RouterError("the settings of one batch must share one mix", found=sorted({s.mix for s in different}))
    if len({(*(setting.general.experts or ()), setting.general.mode) for setting in different}) > 1:
        raise RouterError(
            "the settings of one batch must share their general experts", found=[s.general.experts for s in different]
        )
    without = subtract_general(different[0], state.experts, state.layers)
    plans = [make_plan(setting, state, model, without) for setting in different]
    of_row = [different.index(setting) for setting in row_settings or [routing]]
    for path, layer in state.layers.items():
        layer_gates = [plan.gates[path] for plan in plans]
        general = without[path].module if path in without else None
        if row_settings is None and general is None and isinstance(layer_gates[0], Tensor):
            layer.lora.fix(layer_gates[0], routing.mix)
            continue
        gates = [FixedGate(gate.to(layer.lora.up)) if isinstance(gate, Tensor) else gate for gate in layer_gates]
        gate = gates[0] if row_settings is None else RowGate(gates, of_row)
        layer.lora.route_by(_on(gate, layer), different[0].mix, general)
    state.routing, state.row_settings = routing, None if row_settings is None else tuple(row_settings)
    _set_pass_hooks(model, state, plans, of_row)


def drop_pass_hooks(state: Seating) -> None:
    """Take the hooks away that run when a pass begins."""
    for handle in state.pass_handles:
        handle.remove()
    state.prober, state.pass_handles = None, []


def _set_pass_hooks(model: Any, state: Seating, plans: Sequence[Plan], of_row: Sequence[int]) -> None:
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
        state.pass_handles.append(decoder.register_forward_hook(state.prober.mark))
        if hasattr(type(model), STEP):
            state.pass_handles.append(Prefill(model, state.prober))


def _on(gate: Any, layer: SeatedLayer) -> Any:
    return gate.to(layer.lora.up.device)
