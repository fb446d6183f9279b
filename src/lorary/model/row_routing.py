"""Rows that come and go, each with a setting of its own: what serving needs, whose batch is another in every pass.

`lorary.routing` makes the settings of its rows ready when the block is entered, which takes longer than a pass. Here a
setting is made ready once. From then on, a pass is told by which settings its rows go, and no layer is touched for it.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorary.errors import UsageError
from lorary.lora.context import PerThread, inside, new_block
from lorary.lora.gate import LayerInput
from lorary.lora.gated import GatedLora
from lorary.model.apply import set_pass_hooks
from lorary.model.changing import CHANGING
from lorary.model.decision import TokenDecision
from lorary.model.general_subtraction import Subtracted, subtract_general
from lorary.model.plan import check_setting, constant_weights, make_plan
from lorary.model.row_gates import chosen_by_row, rows_of
from lorary.model.seated import Seated, SeatedChoice
from lorary.model.seating import InForce, seating
from lorary.ops.choose import Chosen, Mix
from lorary.ops.native import Quick
from lorary.ops.upload import upload
from lorary.route.setting import Routing

# Settings that decide and are kept ready: gates of a library of a thousand experts are not small.
MOST_READY = 64


@dataclass(frozen=True)
class Kind:
    """What all rows of one pass must share.

    Args:
        mix: of `Routing`.
        general: names of the general experts.
        mode: how they are taken away.
    """

    mix: Mix = "outputs"
    general: tuple[str, ...] = ()
    mode: str = "delta"


@dataclass(frozen=True, eq=False)
class Ready:
    """A setting that was made ready.

    Args:
        setting: the setting.
        kind: what it shares with the rows beside it.
        weights: (experts,) where it looks at nothing, else None.
        gates: by path of a layer, where it decides.
        decisions: of tokens, where it decides for these.
    """

    setting: Routing
    kind: Kind
    weights: Tensor | None
    gates: Mapping[str, nn.Module]
    decisions: PerThread[TokenDecision] | None = None


class RowRouting:
    """A block, as that of `lorary.routing`, inside of which each pass is told the settings of its rows.

    It is in force in the thread that entered it. No expert may come or go while it is open.

    Args:
        model: a routed model.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._state = model, seating(model)
        self._rows = _Rows()
        self._ready: OrderedDict[str, Ready] = OrderedDict()
        self._without: dict[Kind, dict[str, Subtracted]] = {}
        self._loras: dict[str, GatedLora] = {}
        self._kind = Kind()
        self._block = 0
        self._inside = ExitStack()

    def __enter__(self) -> "RowRouting":
        self._block, state = new_block(), self._state
        with CHANGING:
            self._loras = {path: layer.lora.beside() for path, layer in state.layers.items()}
            state.held[self._block] = InForce(state.default.routing)
            for path, lora in self._loras.items():
                layer = state.layers[path]
                gate = RowsGate(self._rows, path, Seated(layer.experts, len(state.experts)))
                lora.route_by(gate.to(lora.up.device), self._kind.mix)
                layer.lora.hold(self._block, lora)
            set_pass_hooks(self._model, state)
        self._inside.enter_context(inside(self._block))
        return self

    def __exit__(self, *_error: object) -> None:
        self._inside.close()
        with CHANGING:
            del self._state.held[self._block]
            for layer in self._state.layers.values():
                layer.lora.release(self._block)
            set_pass_hooks(self._model, self._state)

    def ready(self, setting: Routing) -> Ready:
        """Make a setting ready; one that decides is kept.

        Args:
            setting: of one row. One that decides for whole requests must have decided.

        Raises:
            RouterError: if it cannot be used over these experts.
            UsageError: if it names layers that are not routed, or has still to decide for its request.
        """
        check_setting(setting, self._state)
        kind = Kind(setting.mix, tuple(setting.general.experts or ()), setting.general.mode)
        weights = constant_weights(setting, self._state.experts)
        if weights is not None:
            # What no expert takes part in is the same in any company.
            return Ready(setting, kind if bool(weights.any()) else Kind(), weights, {})
        check_decided(setting)
        key = json.dumps(setting.to_json(), sort_keys=True)
        if key not in self._ready:
            with CHANGING:
                plan = make_plan(setting, self._state, self._model, self._subtracted(setting, kind))
            gates: dict[str, nn.Module] = {}
            for path, gate in plan.gates.items():
                assert isinstance(gate, nn.Module)
                gates[path] = gate.to(self._loras[path].up.device)
            self._ready[key] = Ready(setting, kind, None, gates, plan.decisions)
        self._ready.move_to_end(key)
        while len(self._ready) > MOST_READY:
            self._ready.popitem(last=False)
        return self._ready[key]

    def use(self, rows: Sequence[Ready]) -> None:
        """Say by which settings the rows of the passes that follow go.

        Args:
            rows: one for each row, all of one kind.
        """
        if self._rows.is_same(rows):
            return
        self._take(rows[0])
        for lora in self._loras.values():
            lora.at_once = None  # compiled code keeps the one gate that it was made for
        self._rows.set(rows)
        decisions = {id(ready.decisions): ready.decisions for ready in rows if ready.decisions is not None}
        self._state.held[self._block] = InForce(self._state.default.routing, None, tuple(decisions.values()))
        if decisions:
            with CHANGING:
                set_pass_hooks(self._model, self._state)

    def _take(self, ready: Ready) -> None:
        """Have the layers mix as all rows of a kind are mixed."""
        if ready.kind == self._kind:
            return
        without = self._subtracted(ready.setting, ready.kind)
        for path, lora in self._loras.items():
            lora.mix = ready.kind.mix
            lora.general = without[path].module.to(lora.up.device) if path in without else None
        self._kind = ready.kind

    def _subtracted(self, setting: Routing, kind: Kind) -> dict[str, Subtracted]:
        if kind not in self._without:
            self._without[kind] = subtract_general(setting, self._state.experts, self._state.layers)
        return self._without[kind]


def check_decided(setting: Routing) -> None:
    """Refuse a setting that has still to decide for its request.

    Args:
        setting: of one row.

    Raises:
        UsageError: if it has.
    """
    if setting.decides == "request":
        raise UsageError(
            "a router that decides for whole requests must have decided before the answer begins",
            found=setting.router,
            remedy="ask Engine.decide first, and submit Decision.setting(...)",
        )


class _Rows:
    """By what the rows of the pass that runs go: the one place that all layers look at."""

    def __init__(self) -> None:
        self.rows: tuple[Ready, ...] = ()
        self.alone: Mapping[str, nn.Module] | None = None
        self.fixed = SeatedChoice(Chosen(torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0)))
        self.deciding: list[tuple[Mapping[str, nn.Module], Tensor]] = []

    def is_same(self, rows: Sequence[Ready]) -> bool:
        """Whether the pass before went by these."""
        return len(rows) == len(self.rows) and all(map(_is, rows, self.rows))

    def set(self, rows: Sequence[Ready]) -> None:
        """Go by others."""
        self.rows = tuple(rows)
        by_setting: dict[int, list[int]] = {}
        for row, ready in enumerate(rows):
            if ready.weights is None:
                by_setting.setdefault(id(ready), []).append(row)
        self.deciding = [(rows[places[0]].gates, torch.tensor(places)) for places in by_setting.values()]
        is_alone = len(self.deciding) == 1 and len(self.deciding[0][1]) == len(rows)
        self.alone = self.deciding[0][0] if is_alone else None
        constant = [ready.weights for ready in rows if ready.weights is not None]
        num_experts = len(constant[0]) if constant else 0
        weights = torch.stack([_or_zeros(r.weights, num_experts) for r in rows])
        counts = (weights != 0).sum(dim=1)
        width = int(counts.max()) if num_experts else 0
        experts = (weights == 0).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
        self.fixed = SeatedChoice(Chosen(experts, weights.gather(1, experts)))

    @property
    def width(self) -> int:
        """Fixed experts of a row at most."""
        return self.fixed.chosen.experts.shape[1]

    def deciding_at(self, device: torch.device) -> list[tuple[Mapping[str, nn.Module], Tensor]]:
        """The settings that decide, each with its rows, on a device; moved once, and not for each layer."""
        if any(places.device != device for _, places in self.deciding):
            self.deciding = [(gates, upload(places, device)) for gates, places in self.deciding]
        return self.deciding

    def most(self, path: str) -> int:
        """Experts of a token at most, in one layer."""
        gates: list[Any] = [by_path[path] for by_path, _ in self.deciding]
        return max([self.width, *(gate.most for gate in gates)])


def _is(first: object, second: object) -> bool:
    return first is second


def _or_zeros(weights: Tensor | None, num_experts: int) -> Tensor:
    return torch.zeros(num_experts, dtype=torch.float64) if weights is None else weights.double()


class RowsGate(nn.Module):
    """The gate of one layer for rows that come and go.

    Args:
        rows: by what they go; shared by all layers.
        path: of the layer.
        seated: which experts sit in it.
    """

    def __init__(self, rows: _Rows, path: str, seated: Seated) -> None:
        super().__init__()
        self.rows, self.path, self.seated = rows, path, seated

    @property
    def quick(self) -> Quick | None:
        """That of the one setting by which all rows go, if it has one."""
        quick: Quick | None = None if self.rows.alone is None else self.rows.alone[self.path].quick  # type: ignore[assignment]
        return quick

    @property
    def decided(self) -> object:
        """The fixed experts of all rows; None where any row's gate decides."""
        return None if self.rows.deciding else self.rows.fixed

    @property
    def most(self) -> int:
        """Experts of a token at most."""
        return self.rows.most(self.path)

    @property
    def reads_prototypes(self) -> bool:
        """Whether any row's gate does."""
        return any(bool(gates[self.path].reads_prototypes) for gates, _ in self.rows.deciding)

    @property
    def reads_z(self) -> bool:
        """Whether any row's gate does."""
        return any(bool(gates[self.path].reads_z) for gates, _ in self.rows.deciding)

    def forward(self, inputs: LayerInput) -> Chosen | None:
        """The experts of each token; None where all rows leave the layer as it is."""
        rows = self.rows
        if rows.alone is not None:
            chosen: Chosen | None = rows.alone[self.path](inputs)
            return chosen
        batch, seq = rows_of(inputs)
        if batch != len(rows.rows):
            raise UsageError(
                "a pass must have one row for each setting", found=f"{len(rows.rows)} settings for {batch} rows"
            )
        if rows.deciding:
            parts = [(gates[self.path], places) for gates, places in rows.deciding_at(inputs.x.device)]
            return chosen_by_row(inputs, rows.fixed.tokens(self.seated, inputs.x, 1, self.most), parts)
        return rows.fixed.tokens(self.seated, inputs.x, seq) if rows.width else None
