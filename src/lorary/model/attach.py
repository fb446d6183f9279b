"""A base model and a library become one routed model, which is still the same PreTrainedModel."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lorary.adapter import Adapter
from lorary.errors import LibraryError, RouterError, UsageError
from lorary.library.store import Library
from lorary.lora.gated import Mix
from lorary.lora.seat import seat, unseat
from lorary.model.layers import SeatedLayer, build_layers
from lorary.ops.choose import check_choice, top_k_softmax
from lorary.route import ROUTERS
from lorary.route.arrow import AMBIGUOUS_GAP
from lorary.route.fixed import fixed_weights

_STATE = "_lorary"


@dataclass(frozen=True)
class Routing:
    """Settings of one router.

    Args:
        router: a name in `lorary.route.ROUTERS`; ignored where `experts` names them.
        top_k: experts per token and layer, at least 1, clamped to the number there is.
        temperature: divides the scores, above 0.
        mix: `outputs` (the weighted sum of the experts' updates) or `factors` (the product of weighted factors).
        experts: experts with a fixed weight each; given names alone, they share the weight 1.

    Raises:
        RouterError: if there is no such router or mix.
        UsageError: if `top_k` or `temperature` is out of range.
    """

    router: str = "arrow"
    top_k: int = 4
    temperature: float = 1.0
    mix: Mix = "outputs"
    experts: Mapping[str, float] | Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_choice(self.top_k, self.temperature)
        if self.mix not in get_args(Mix):
            raise RouterError(f"mix must be one of {list(get_args(Mix))}", found=self.mix)
        if self.experts is not None:
            _check_experts(self.experts)
        if self.experts is None and self.router not in ROUTERS:
            raise RouterError(
                "a router must exist", found=self.router, remedy=f"one of {list(ROUTERS)}, or experts=[...]"
            )

    @property
    def fixed(self) -> dict[str, float] | None:
        """Weight by expert where experts are named, else None."""
        if self.experts is None or isinstance(self.experts, Mapping):
            return None if self.experts is None else dict(self.experts)
        return {name: 1.0 / len(self.experts) for name in self.experts}


@dataclass
class Seating:
    """What `attach` leaves on a model: the experts' names, the routed layers and the router in force."""

    experts: tuple[str, ...]
    layers: dict[str, SeatedLayer]
    handles: list[RemovableHandle]
    routing: Routing

    def ambiguous(self) -> list[tuple[str, str, float]]:
        """(expert, layer, σ2/σ1) of every prototype whose direction is not well defined."""
        return [
            (self.experts[expert], path, float(ratio))
            for path, layer in self.layers.items()
            for expert, ratio in zip(layer.experts, layer.gap, strict=True)
            if ratio > AMBIGUOUS_GAP
        ]


def attach(
    base_model: Any,
    library: Library | str,
    *,
    router: str | None = None,
    top_k: int | None = None,
    temperature: float | None = None,
    mix: Mix | None = None,
    experts: Mapping[str, float] | Sequence[str] | None = None,
    force_base: bool = False,
) -> Any:
    """Seat every adapter of a library in a model and let a router choose among them.

    The model is changed in place and returned: it remains the same PreTrainedModel, with its own `generate`. Experts
    stand in the order of their names, so that the order in which adapters were added changes nothing.

    Args:
        base_model: a transformers model for causal language modelling, on its device, in its dtype.
        library: the library, or its path.
        router: a name in `lorary.route.ROUTERS`; the library's default, else arrow.
        top_k: experts per token and layer; the library's default, else 4.
        temperature: divides the scores; the library's default, else 1.
        mix: `outputs` or `factors`; the library's default, else outputs.
        experts: fixed experts (names, or weights by name) in place of a router.
        force_base: attach although the base model's weights are unrelated to those that the library was made for.

    Returns:
        `base_model`.

    Raises:
        LibraryError: if the library holds no adapter.
        BaseModelError: if the model is not the library's base.
        AdapterError: if an adapter does not fit.
        RouterError: if the router does not exist or cannot run over these experts.
    """
    library = library if isinstance(library, Library) else Library.open(library)
    given = {"router": router, "top_k": top_k, "temperature": temperature, "mix": mix, "experts": experts}
    routing = Routing(**{**library.default_router, **{key: value for key, value in given.items() if value is not None}})
    if hasattr(base_model, _STATE):
        raise UsageError("a model can hold one library at a time", found="experts are seated", remedy="lorary.detach")
    names = library.names()
    if not names:
        raise LibraryError(
            f"library '{library.path}' must hold an adapter to route over", found="none", remedy="lorary library add"
        )
    library.check_base(base_model, force_base=force_base)
    layers = build_layers(base_model, _Adapters(library, names))
    _check_mix(routing, layers)
    state = Seating(tuple(names), layers, [], routing)
    _apply_routing(state)
    state.handles = seat(base_model, {path: layer.lora for path, layer in layers.items()})
    setattr(base_model, _STATE, state)
    _warn_of_ambiguity(state)
    return base_model


def detach(model: Any) -> Any:
    """Take the experts away again; the model computes what it did before `attach`.

    Args:
        model: a routed model, changed in place.

    Returns:
        `model`.

    Raises:
        UsageError: if no experts are seated in it.
    """
    state = seating(model)
    unseat(model, list(state.layers), state.handles)
    delattr(model, _STATE)
    return model


@contextmanager
def routing(model: Any, setting: str | Mapping[str, Any]) -> Iterator[Any]:
    """Route by another setting inside a `with` block.

    Args:
        model: a routed model.
        setting: the name of a router, or fields of `Routing` such as `{"experts": ["sst2"]}`; fields that are not
            given keep the value they have.

    Yields:
        `model`.

    Raises:
        UsageError: if no experts are seated in it, or the setting has a field that does not exist.
        RouterError: if the setting cannot be used over these experts.
    """
    state = seating(model)
    before = state.routing
    if not isinstance(setting, (str, Mapping)):
        raise UsageError("a routing setting must be a router's name or fields of Routing", found=repr(setting))
    changes: dict[str, Any] = {"router": setting} if isinstance(setting, str) else dict(setting)
    _check_fields(changes)
    if "router" in changes:
        changes.setdefault("experts", None)
    wanted = replace(before, **changes)
    _check_mix(wanted, state.layers)
    state.routing = wanted
    try:
        _apply_routing(state)
        yield model
    finally:
        state.routing = before
        _apply_routing(state)


def seating(model: Any) -> Seating:
    """What `attach` left on a model.

    Raises:
        UsageError: if no experts are seated in it.
    """
    state = getattr(model, _STATE, None)
    if state is None:
        raise UsageError("the model must be a routed one", found=type(model).__name__, remedy="lorary.attach")
    assert isinstance(state, Seating)
    return state


def _warn_of_ambiguity(state: Seating) -> None:
    """Say which prototypes a hair's breadth of rounding could turn: routing by them is arbitrary."""
    found = state.ambiguous()
    if found:
        expert, path, ratio = found[0]
        message = (
            f"{len(found)} prototypes are ambiguous, since their two largest singular values are nearly equal: "
            f"expert '{expert}' at {path} has σ2/σ1 = {ratio:.5f}"
        )
        warnings.warn(message, stacklevel=3)


def _check_experts(experts: Any) -> None:
    """Refuse what is no list of different names, and no weights by name."""
    is_weights = isinstance(experts, Mapping) and all(
        isinstance(weight, (int, float)) and not isinstance(weight, bool) for weight in experts.values()
    )
    is_names = isinstance(experts, Sequence) and not isinstance(experts, str) and len(set(experts)) == len(experts)
    if not experts or not (is_weights or is_names):
        raise RouterError(
            "experts must be a list of different names, or weights by name",
            found=repr(experts),
            remedy="router 'base' uses no expert",
        )


def _check_fields(changes: Mapping[str, Any]) -> None:
    known = [field.name for field in fields(Routing)]
    unknown = [key for key in changes if key not in known]
    if unknown:
        raise UsageError("a routing setting must have known fields only", found=unknown, remedy=f"it has {known}")


def _check_mix(routing: Routing, layers: Mapping[str, SeatedLayer]) -> None:
    """Refuse to mix factors of unequal ranks: there is no matrix to average."""
    if routing.mix != "factors":
        return
    for path, layer in layers.items():
        ranks = set(torch.bincount(layer.lora.expert_of_rank).tolist())
        if len(ranks) > 1:
            raise RouterError(
                f"mixing factors needs experts of one rank, at layer '{path}' too",
                found=f"ranks {sorted(ranks)}",
                remedy="mix='outputs'",
            )


def _apply_routing(state: Seating) -> None:
    """Hand the router in force to every routed layer."""
    routing = state.routing
    if routing.fixed is not None:
        return _fix(state, fixed_weights(state.experts, routing.fixed))
    rule = ROUTERS[routing.router]
    if rule.weights is not None:
        return _fix(state, rule.weights(state.experts))
    for layer in state.layers.values():
        layer.lora.route_by(_TokenGate(rule.readout, layer.alive, routing.top_k, routing.temperature), routing.mix)


def _fix(state: Seating, weights: Tensor) -> None:
    for layer in state.layers.values():
        layer.lora.fix(weights[list(layer.experts)], state.routing.mix)


@dataclass(frozen=True)
class _TokenGate:
    """Scores, then the choice: a rule that looks at each token."""

    readout: Any
    alive: Tensor
    top_k: int
    temperature: float

    def __call__(self, projections: Tensor) -> Tensor:
        alive = self.alive.to(projections.device)
        return top_k_softmax(self.readout(projections, alive), self.top_k, self.temperature)


@dataclass(frozen=True)
class _Adapters:
    """The adapters of a library, read anew each time they are gone through."""

    library: Library
    names: Sequence[str]

    def __iter__(self) -> Iterator[Adapter]:
        return (self.library.get(name) for name in self.names)
