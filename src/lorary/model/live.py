"""Experts that come and go while the model is routed: only what belongs to them is computed.

A new expert takes the seat behind the others, whatever its name; the order of names, in which experts are reported,
is kept by renumbering. So a model that changed live equals one that was built anew up to rounding, since its sums run
in another order; `lorary.save` writes that order down. The library on disk is left alone.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from lorary.adapter import Adapter
from lorary.errors import RouterError, UsageError
from lorary.formats.peft import read_adapter
from lorary.library.fingerprint import bare_modules
from lorary.library.fit import check_whole
from lorary.library.folders import check_name
from lorary.library.placing import placed_adapter, placed_layers
from lorary.lora.seat import find_linear, linear_shape, seat, unseat
from lorary.lora.targets import is_language
from lorary.model.apply import apply_routing
from lorary.model.beside import Beside, beside_of
from lorary.model.changing import changing
from lorary.model.general_subtraction import check_general, seated_ranks
from lorary.model.layers import beyond, build_layers, check_copies_of, in_order, more_than_factors
from lorary.model.plan import settled
from lorary.model.prepared import PreparedTensors, paths_of
from lorary.model.seating import Seating, check_no_block, seating
from lorary.model.verdict import check_layers
from lorary.model.yardstick import live_moments
from lorary.ops.finite import is_finite
from lorary.route.setting import Routing


def add_expert(model: Any, adapter: Adapter | str | Path, name: str | None = None) -> str:
    """Seat one more expert in a routed model.

    Args:
        model: a routed model, changed in place.
        adapter: the adapter, or the path of its PEFT folder.
        name: of the expert; the adapter's own by default.

    Returns:
        The name.

    Raises:
        UsageError: if the model is not routed, is inside a `with lorary.routing` or `lorary.trace` block of any thread,
            another thread computes with it, or the name cannot be one.
        RouterError: if the name is taken, or the router in force cannot run over the experts that there would be.
        AdapterError: if the adapter does not fit, or is not whole.
    """
    with _changeable(model) as state:
        return _add_expert(model, state, _read(model, state, adapter, name))


def _add_expert(model: Any, state: Seating, adapter: Adapter) -> str:
    if adapter.name in state.experts:
        raise RouterError(
            "each expert must have a name of its own",
            found=f"'{adapter.name}' is seated",
            remedy="lorary.replace_expert, or another name",
        )
    beside = _check_fit(model, adapter)
    _check_ranks(state, adapter)
    _check_general(state, adapter.name, adapter)
    setting = settled(state.routing, state, model)
    kind = setting.data_kind
    prepared = state.prepared.get(kind or "", {}).get(adapter.name, {})
    is_prepared = paths_of(setting, adapter.modules) <= set(prepared)
    moments = {} if is_prepared else live_moments(setting, state, model, adapter)
    if not (is_prepared or moments):
        raise RouterError(
            f"an expert that comes to a router by '{kind}' must be prepared before",
            found=f"nothing for '{adapter.name}'",
            remedy="lorary.model.prepare.prepare",
        )
    _add(model, state, adapter, beside)
    _keep_moments(state, setting, moments)
    apply_routing(model, state, state.routing)
    return adapter.name


def remove_expert(model: Any, name: str) -> None:
    """Take one expert out of a routed model.

    Args:
        model: a routed model, changed in place.
        name: of the expert.

    Raises:
        UsageError: as for `add_expert`, or if it is the last one.
        RouterError: if there is no such expert, or the router in force names it.
    """
    with _changeable(model) as state:
        _remove_expert(model, state, name)


def _remove_expert(model: Any, state: Seating, name: str) -> None:
    _check_seated(state, name)
    if len(state.experts) == 1:
        raise UsageError(
            "a routed model must keep an expert",
            found=f"'{name}' is the last one",
            remedy="lorary.detach(model) gives the bare base, router 'base' computes what it does",
        )
    setting = state.routing
    if name in setting.named:
        raise RouterError(
            "an expert that the router in force names must stay", found=name, remedy="attach with another setting"
        )
    _check_layers_stay(state, name, ())
    _check_general(state, name, None)
    _remove(model, state, name)
    apply_routing(model, state, state.routing)


def replace_expert(model: Any, adapter: Adapter | str | Path, name: str | None = None) -> str:
    """Put an adapter in the place of the expert that has its name.

    One that adapts the same layers at the same ranks takes its seat; another one comes behind the others.

    Args and errors as for `add_expert`, but the name must be seated.

    Returns:
        The name.
    """
    with _changeable(model) as state:
        return _replace_expert(model, state, _read(model, state, adapter, name))


def _replace_expert(model: Any, state: Seating, adapter: Adapter) -> str:
    _check_seated(state, adapter.name)
    beside = _check_fit(model, adapter)
    _check_ranks(state, adapter)
    _check_general(state, adapter.name, adapter)
    _check_layers_stay(state, adapter.name, adapter.modules)
    setting = settled(state.routing, state, model)
    kind = setting.data_kind
    moments = live_moments(setting, state, model, adapter)
    if kind is not None and not moments:
        raise RouterError(
            "an expert cannot be replaced under a router that knows the old one by its data",
            found=f"router '{state.routing.router}' by '{kind}'",
            remedy="attach with a router that needs weights alone",
        )
    position = state.experts.index(adapter.name)
    seated_layers = {path: layer for path, layer in state.layers.items() if position in layer.experts}
    if {path: layer.ranks[layer.experts.index(position)] for path, layer in seated_layers.items()} == {
        path: factors.rank for path, factors in adapter
    }:
        for path, layer in seated_layers.items():
            layer.replace(layer.experts.index(position), adapter.modules[path], beside[path])
        state.live[adapter.name] = adapter
    else:
        _remove(model, state, adapter.name)
        _add(model, state, adapter, beside)
    state.prepared = {kind: _without(tensors, adapter.name) for kind, tensors in state.prepared.items()}
    _keep_moments(state, setting, moments)
    apply_routing(model, state, state.routing)
    return adapter.name


def _keep_moments(state: Seating, setting: Routing, moments: PreparedTensors) -> None:
    """Give the router in force what was measured for an expert that came."""
    if moments and setting.data is not None:
        kind = setting.data.yardstick_kind
        state.prepared[kind] = {**state.prepared.get(kind, {}), **moments}


@contextmanager
def _changeable(model: Any) -> Iterator[Seating]:
    state = seating(model)
    with changing(model):
        check_no_block(state)
        yield state


def _read(model: Any, state: Seating, adapter: Adapter | str | Path, name: str | None) -> Adapter:
    base = state.library.base.fingerprint
    if isinstance(adapter, Adapter):
        adapter = Adapter(name or adapter.name, adapter.modules, adapter.config, adapter.tensors)
    else:
        adapter = read_adapter(adapter, name, with_copies=True)
        layers = [path for path, module in bare_modules(model) if linear_shape(module)]
        language = [path for path in layers if is_language(path, base.language)]
        check_whole(adapter, language, placed_layers(adapter.name, adapter.modules, base))
        check_copies_of(adapter, model)
    check_name(adapter.name)
    return placed_adapter(adapter, base)


def _check_seated(state: Seating, name: str) -> None:
    if name not in state.experts:
        raise RouterError("the expert must be seated", found=name, remedy=f"it has {list(state.experts)}")


def _check_fit(model: Any, adapter: Adapter) -> dict[str, Beside]:
    """Refuse what does not fit, before anything is changed; what the expert adds beside its factors, by path."""
    beside = {}
    for path, factors in adapter:
        layer = find_linear(model, path, adapter.name, factors.d_in, factors.d_out)
        if not (is_finite(factors.lora_b.float() * factors.scaling) and is_finite(factors.lora_a)):
            raise beyond(adapter.name, path, factors.scaling)
        beside[path] = beside_of(layer, path, adapter.name, factors)
        if not all(is_finite(part.float()) for part in beside[path] if part is not None):
            raise beyond(adapter.name, path, factors.scaling)
    check_layers(model, {adapter.name: [path for path, _ in adapter]})
    return beside


def _check_ranks(state: Seating, adapter: Adapter) -> None:
    """Refuse unequal ranks while factors are mixed, before anything is changed."""
    if state.routing.mix != "factors":
        return
    for path, factors in adapter:
        if factors.further is not None:
            raise more_than_factors("mixing factors", path, "mix='outputs'")
        layer = state.layers.get(path)
        seated = () if layer is None else zip(layer.experts, layer.ranks, strict=True)
        if any(rank != factors.rank for expert, rank in seated if state.experts[expert] != adapter.name):
            raise RouterError(
                f"mixing factors needs experts of one rank, at layer '{path}' too",
                found=f"expert '{adapter.name}' has rank {factors.rank}",
                remedy="mix='outputs'",
            )


def _check_general(state: Seating, name: str, adapter: Adapter | None) -> None:
    """Refuse what general experts could not be taken from any more, before anything is changed."""
    if state.routing.general.experts is None:
        return
    for path, factors in adapter or ():
        if state.routing.general.mode == "factors" and factors.further is not None:
            raise more_than_factors("general_mode='factors'", path, "general_mode='delta'")
    ranks = seated_ranks(state.experts, state.layers)
    for expert_ranks in ranks.values():
        expert_ranks.pop(name, None)
    for path, factors in adapter or ():
        ranks.setdefault(path, {})[name] = factors.rank
    remaining = [other for other in state.experts if other != name]
    names = remaining if adapter is None else [*remaining, name]
    check_general(state.routing, names, {path: expert_ranks for path, expert_ranks in ranks.items() if expert_ranks})


def _check_layers_stay(state: Seating, name: str, modules: Iterable[str]) -> None:
    """Refuse to take the last expert from a layer that the router in force names."""
    position, setting = state.experts.index(name), state.routing
    emptied = {path for path, layer in state.layers.items() if layer.experts == (position,)} - set(modules)
    temperature = setting.choosing.temperature
    by_path = temperature if isinstance(temperature, Mapping) else {}
    named = sorted(emptied & {setting.at, *map(str, by_path)})
    if named:
        raise RouterError(
            "a layer that the router in force names must keep an expert",
            found=f"'{name}' is the only one at {named[0]}",
            remedy="attach with another setting",
        )


def _add(model: Any, state: Seating, adapter: Adapter, beside: Mapping[str, Beside]) -> None:
    names = sorted((*state.experts, adapter.name))
    position = names.index(adapter.name)
    _renumber(state, tuple(names))
    new = {path: factors for path, factors in adapter if path not in state.layers}
    for path, factors in adapter:
        if path in state.layers:
            state.layers[path].append(position, factors, beside[path])
    if new:
        only = Adapter(adapter.name, new, adapter.config)
        layers = build_layers(model, [only], [position])
        handles = seat(model, {path: layer.lora for path, layer in layers.items()})
        state.handles.update(zip(layers, handles, strict=True))
        layers.update(state.layers)
        state.layers = {path: layers[path] for path in in_order(model, layers)}
    state.seats = (*state.seats, adapter.name)
    state.live[adapter.name] = adapter


def _remove(model: Any, state: Seating, name: str) -> None:
    position = state.experts.index(name)
    empty: list[str] = []
    for path, layer in state.layers.items():
        if layer.experts == (position,):
            empty.append(path)
        elif position in layer.experts:
            layer.remove(layer.experts.index(position))
    unseat(model, empty, [state.handles.pop(path) for path in empty])
    state.layers = {path: layer for path, layer in state.layers.items() if path not in empty}
    _renumber(state, tuple(other for other in state.experts if other != name))
    state.seats = tuple(other for other in state.seats if other != name)
    state.live.pop(name, None)
    state.prepared = {kind: _without(tensors, name) for kind, tensors in state.prepared.items()}


def _renumber(state: Seating, names: tuple[str, ...]) -> None:
    """Let every layer's positions mean another list of names."""
    old = state.experts
    # An expert that is about to go is in no layer any more.
    moved = {position: names.index(name) for position, name in enumerate(old) if name in names}
    for layer in state.layers.values():
        layer.experts = tuple(moved[position] for position in layer.experts)
    state.experts = names


def _without(prepared: Mapping[str, Mapping[str, Tensor]], name: str) -> dict[str, Mapping[str, Tensor]]:
    return {other: tensors for other, tensors in prepared.items() if other != name}
