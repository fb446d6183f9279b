"""What `attach` leaves on a model."""

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch.utils.hooks import RemovableHandle

from lorary.adapter import Adapter
from lorary.errors import UsageError
from lorary.library.store import Library
from lorary.model.layers import SeatedLayer
from lorary.model.prepared import PreparedTensors
from lorary.model.probe import Prober
from lorary.route.arrow import AMBIGUOUS_GAP
from lorary.route.setting import Routing

STATE = "_lorary"


@runtime_checkable
class Handle(Protocol):
    """Something that was put on a model and can be taken away."""

    def remove(self) -> None:
        """Take it away."""


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
        row_settings: one setting per row of a batch, where they were given one by one.
        prepared: what rules need beyond weights, by kind; read from the library when a setting first needs it.
        live: experts that came live and are not the library's.
        num_blocks: how many `with lorary.routing` blocks are open.
        tokenizer: of the base, for rules that read text; None where it was not given.
        template: in which prompts come; that of the experts where None.
        prober: decides for requests, where a setting asks for that.
        pass_handles: of the hooks that run when a pass of the decoder begins.
        position_handles: of those that keep positions alike in every pass.
    """

    experts: tuple[str, ...]
    layers: dict[str, SeatedLayer]
    handles: dict[str, RemovableHandle]
    routing: Routing
    library: Library
    seats: tuple[str, ...]
    row_settings: tuple[Routing, ...] | None = None
    prepared: dict[str, PreparedTensors] = field(default_factory=dict)
    live: dict[str, Adapter] = field(default_factory=dict)
    num_blocks: int = 0
    tokenizer: Any = None
    template: str | None = None
    prober: Prober | None = None
    pass_handles: list[Handle] = field(default_factory=list)
    position_handles: list[RemovableHandle] = field(default_factory=list)

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
    return state is not None and seating(model).row_settings is not None
