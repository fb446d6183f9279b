"""What `attach` leaves on a model."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch.utils.hooks import RemovableHandle

from lorary.adapter import Adapter
from lorary.errors import UsageError
from lorary.library.store import Library
from lorary.lora.context import PerThread, innermost
from lorary.model.argument import check_model
from lorary.model.check_seated import check_unchanged
from lorary.model.decision import TokenDecision
from lorary.model.fallback import Evidence, load_evidence
from lorary.model.handle import Handle
from lorary.model.layers import SeatedLayer
from lorary.model.prepared import PreparedTensors
from lorary.model.probe import Prober
from lorary.route.arrow import AMBIGUOUS_GAP
from lorary.route.setting import Routing

STATE = "_lorary"


@dataclass(frozen=True)
class InForce:
    """A setting that was made ready, and what decides by it beyond one layer.

    Args:
        routing: the router, or the one that the rows' settings change.
        row_settings: one setting per row of a batch, where they were given one by one.
        decisions: for tokens, where a setting asks for that.
        probers: decide for requests, where a setting asks for that.
    """

    routing: Routing
    row_settings: tuple[Routing, ...] | None = None
    decisions: tuple[PerThread[TokenDecision], ...] = ()
    probers: PerThread[Prober] | None = None


@dataclass(repr=False)
class Seating:
    """What `attach` leaves on a model.

    Args:
        experts: names, in canonical order.
        layers: the routed layers, in the model's order.
        handles: of the hooks of `layers`.
        default: the setting in force outside of all blocks.
        library: where the experts came from.
        seats: names in the order of their seats: fresh ones as `experts`, those that came live behind them.
        held: the settings of open `with lorary.routing` blocks, by block.
        prepared: what rules need beyond weights, by kind; read from the library when a setting first needs it.
        live: experts that came live and are not the library's.
        tokenizer: of the base, for rules that read text; None where it was not given.
        template: in which prompts come; that of the experts where None.
        pass_handles: of the hooks that run when a pass begins or ends.
        base_handles: of those that keep positions alike in every pass, and note rows.
    """

    experts: tuple[str, ...]
    layers: dict[str, SeatedLayer]
    handles: dict[str, RemovableHandle]
    default: InForce
    library: Library
    seats: tuple[str, ...]
    held: dict[int, InForce] = field(default_factory=dict)
    prepared: dict[str, PreparedTensors] = field(default_factory=dict)
    live: dict[str, Adapter] = field(default_factory=dict)
    tokenizer: Any = None
    template: str | None = None
    pass_handles: list[Handle] = field(default_factory=list)
    base_handles: list[Handle] = field(default_factory=list)

    @property
    def in_force(self) -> InForce:
        """The setting of the innermost block that the running thread or task stands in, or the default."""
        return innermost(self.held, self.default)

    @property
    def routing(self) -> Routing:
        """The router in force, or the one that the rows' settings change."""
        return self.in_force.routing

    @property
    def prober(self) -> Prober | None:
        """Decides for requests in the thread that runs, where the setting in force asks for that."""
        probers = self.in_force.probers
        return None if probers is None else probers.here

    @cached_property
    def evidence(self) -> Evidence | None:
        """What the library knows of requests that no expert fits; read when a setting first needs it, and then kept.

        Experts that come or go live leave it as it is.

        Raises:
            LibraryError: if it is damaged, or the library holds other weights than the seated ones.
        """
        evidence = load_evidence(self.library)
        if evidence is not None:
            check_unchanged(self.library, self.experts, self.layers, self.live)
        return evidence

    def __getstate__(self) -> dict[str, Any]:
        # A copy made in a block routes as the block does.
        return {**vars(self), "default": self.in_force, "held": {}}

    def __repr__(self) -> str:
        settings = [setting.to_json() for setting in self.in_force.row_settings or [self.routing]]
        shown = settings if self.in_force.row_settings else settings[0]
        return f"Seating({len(self.experts)} experts {list(self.experts)} in {len(self.layers)} layers, {shown})"

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
        UsageError: if it is no model, or no experts are seated in it.
    """
    state = getattr(model, STATE, None)
    if state is None:
        check_model(model)
        raise UsageError("the model must be a routed one", found=type(model).__name__, remedy="lorary.attach")
    assert isinstance(state, Seating)
    return state


def check_no_block(state: Seating) -> None:
    """Refuse to change what open blocks route or record by.

    Raises:
        UsageError: if there is one, in any thread.
    """
    if state.held or any(layer.lora.recorders for layer in state.layers.values()):
        raise UsageError(
            "experts can come and go outside of `with lorary.routing` and `lorary.trace` blocks only",
            found="an open block, of this thread or another",
        )


def prober_of(model: Any) -> Prober | None:
    """What decides for requests in a model; None for one that is bare, or decides otherwise."""
    state = getattr(model, STATE, None)
    return None if state is None else seating(model).prober


def has_row_settings(model: Any) -> bool:
    """Whether the rows of a batch have settings of their own, so that their number and order say which is whose."""
    state = getattr(model, STATE, None)
    return state is not None and seating(model).in_force.row_settings is not None
