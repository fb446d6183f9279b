"""How settings reach every routed layer."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lorary.errors import RouterError
from lorary.lora.context import inside, new_block
from lorary.lora.fused import is_fused_on
from lorary.lora.gated import GatedLora
from lorary.model.changing import CHANGING
from lorary.model.features import decoder_of
from lorary.model.general_subtraction import subtract_general
from lorary.model.passes import Passes
from lorary.model.plan import make_plan
from lorary.model.prefill import STEP, Prefill
from lorary.model.probe import make_probers
from lorary.model.row_gates import FixedGate, RowGate
from lorary.model.seating import InForce, Seating
from lorary.route.setting import Routing


def apply_routing(model: Any, state: Seating, routing: Routing) -> None:
    """Make a setting the default of a model; on failure the one before stays.

    Args:
        model: that the experts are seated in.
        state: its seating, or the one it is about to get.
        routing: the setting.

    Raises:
        RouterError: if the setting cannot be used over these experts.
        UsageError: if it names layers that are not routed.
    """
    with CHANGING:
        state.default = _apply(model, state, {path: layer.lora for path, layer in state.layers.items()}, routing)
        set_pass_hooks(model, state)


@contextmanager
def applied(
    model: Any, state: Seating, routing: Routing, row_settings: Sequence[Routing] | None = None
) -> Iterator[None]:
    """Put settings in force for the code inside the context, in its thread or asyncio task alone.

    Args:
        model: that the experts are seated in.
        state: its seating.
        routing: for all rows, or what `row_settings` were made from.
        row_settings: one setting per row.

    Raises:
        RouterError: if a setting cannot be used over these experts.
        UsageError: if it names layers that are not routed.
    """
    block, layers = new_block(), state.layers
    with CHANGING:
        loras = {path: layer.lora.beside() for path, layer in layers.items()}
        state.held[block] = _apply(model, state, loras, routing, row_settings)
        for path, lora in loras.items():
            layers[path].lora.hold(block, lora)
        set_pass_hooks(model, state)
    try:
        with inside(block):
            yield
    finally:
        with CHANGING:
            del state.held[block]
            for layer in layers.values():
                layer.lora.release(block)
            set_pass_hooks(model, state)


def drop_pass_hooks(state: Seating) -> None:
    """Take the hooks away that run when a pass begins or ends."""
    for handle in state.pass_handles:
        handle.remove()
    state.pass_handles = []


def _apply(
    model: Any,
    state: Seating,
    loras: Mapping[str, GatedLora],
    routing: Routing,
    row_settings: Sequence[Routing] | None = None,
) -> InForce:
    """Have modules route by settings; nothing has changed where it fails."""
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
    is_fused = is_fused_on()
    without = subtract_general(different[0], state.experts, state.layers)
    plans = [make_plan(setting, state, model, without) for setting in different]
    of_row = [different.index(setting) for setting in row_settings or [routing]]
    for path, lora in loras.items():
        layer_gates = [plan.gates[path] for plan in plans]
        general = without[path].module if path in without else None
        if row_settings is None and general is None and isinstance(layer_gates[0], Tensor):
            lora.fix(layer_gates[0], routing.mix)
            continue
        gates = [FixedGate(gate.to(lora.up.dtype)) if isinstance(gate, Tensor) else gate for gate in layer_gates]
        gate: Any = gates[0] if row_settings is None else RowGate(gates, of_row)
        lora.route_by(gate.to(lora.up.device), different[0].mix, general, is_fused=is_fused)
    is_probed = any(plan.requests is not None for plan in plans)
    return InForce(
        routing,
        None if row_settings is None else tuple(row_settings),
        tuple(plan.decisions for plan in plans if plan.decisions is not None),
        make_probers([plan.requests for plan in plans], of_row) if is_probed else None,
    )


def set_pass_hooks(model: Any, state: Seating) -> None:
    """Have hooks where any setting needs them.

    Args:
        model: that the experts are seated in.
        state: its seating.
    """
    settings = [state.default, *state.held.values()]
    is_needed = any(setting.decisions or setting.probers is not None for setting in settings)
    if not is_needed:
        drop_pass_hooks(state)
    elif not state.pass_handles:
        state.pass_handles = [*Passes(state).register(model, decoder_of(model))]
        if hasattr(type(model), STEP):
            state.pass_handles.append(Prefill(model, state))
