"""A base model and a library become one routed model, which is still the same PreTrainedModel."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import nn

from lorary.adapter import Adapter
from lorary.errors import LibraryError, LoraryError, UsageError
from lorary.library.readers import READ_ATTEMPTS
from lorary.library.store import Library
from lorary.library.target_groups import different_targets
from lorary.lora.seat import seat, unseat
from lorary.model.apply import applied, apply_routing, drop_pass_hooks
from lorary.model.argument import check_model
from lorary.model.changing import changing
from lorary.model.layers import SeatedLayer, build_layers
from lorary.model.saving import SaveWarning
from lorary.model.seating import STATE, InForce, Seating, check_no_block, seating
from lorary.model.verdict import check_computes, check_layers, settle
from lorary.ops.choose import Mix
from lorary.route import ROUTERS
from lorary.route.presets import merged, preset_fields
from lorary.route.setting import Routing

__all__ = ["Routing", "Seating", "attach", "detach", "routing", "seating"]

Model = TypeVar("Model")
Setting = str | Mapping[str, Any] | Routing


def attach(
    base_model: Model,
    library: Library | str | Path,
    *,
    router: str | None = None,
    top_k: int | None = None,
    temperature: float | None = None,
    mix: Mix | None = None,
    experts: Mapping[str, float] | Sequence[str] | None = None,
    preset: str | None = None,
    tokenizer: Any = None,
    template: str | None = None,
    force_base: bool = False,
    **settings: Any,
) -> Model:
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
        preset: a name in `lorary.route.presets.PRESETS`, in place of the library's default.
        tokenizer: of the base, for routers that read text (`features="text"`) or measure experts on prompts that ship
            with the package; else the one beside the base's files.
        template: in which prompts will come, `plain` or `chat`, for the same; that of the experts where None.
        force_base: attach although the base model's weights are unrelated to those that the library was made for.
        settings: further fields of `lorary.route.setting.FIELDS`; here None is a value, and not the library's.

    Returns:
        `base_model`.

    Raises:
        LibraryError: if the library holds no adapter.
        BaseModelError: if the model is not the library's base, or does not compute as Lorary supposes.
        AdapterError: if an adapter does not fit.
        RouterError: if the router does not exist or cannot run over these experts.
        UsageError: if a setting does not exist or is out of range, or something else is given for model or library.
    """
    check_model(base_model)
    library = library if isinstance(library, Library) else Library.open(library)
    options = {"router": router, "top_k": top_k, "temperature": temperature, "mix": mix, "experts": experts}
    start = library.default_router if preset is None else preset_fields(preset)
    setting = merged(
        Routing.of(**start), {key: value for key, value in options.items() if value is not None} | settings
    )
    routed: Model = seat_library(
        base_model, library, setting, tokenizer=tokenizer, template=template, force_base=force_base
    )
    return routed


def seat_library(
    model: Any,
    library: Library,
    setting: Routing,
    *,
    seats: Sequence[str] | None = None,
    tokenizer: Any = None,
    template: str | None = None,
    force_base: bool = False,
) -> Any:
    """Seat every adapter of a library in a model; see `attach`.

    Args:
        model: changed in place.
        library: where the adapters are.
        setting: the router.
        seats: the names in the order of their seats, where it is not that of the names.
        tokenizer: of the base, where a router may read text.
        template: in which prompts will come; that of the experts where None.
        force_base: accept unrelated weights of the same shapes.

    Returns:
        `model`.
    """
    if hasattr(model, STATE):
        raise UsageError("a model can hold one library at a time", found="experts are seated", remedy="lorary.detach")
    library.check_base(model, force_base=force_base)
    verdict = check_computes(model, library.base.name, must_run=False)
    names, order, layers = _read_layers(model, library, seats)
    state = Seating(names, layers, {}, InForce(setting), library, order, tokenizer=tokenizer, template=template)
    state.base_handles = settle(model, verdict)
    try:
        apply_routing(model, state, setting)
        handles = seat(model, {path: layer.lora for path, layer in layers.items()})
    except BaseException:
        drop_pass_hooks(state)
        for handle in state.base_handles:
            handle.remove()
        raise
    state.handles = dict(zip(layers, handles, strict=True))
    setattr(model, STATE, state)
    state.base_handles.append(SaveWarning(model))
    _warn_of_ambiguity(state)
    _warn_of_targets(state)
    _warn_of_scores(state, [setting])
    return model


def _read_layers(
    model: Any, library: Library, seats: Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, SeatedLayer]]:
    """Names, names in the order of seats, and layers; read again where a writer took an adapter away meanwhile."""
    for attempt in range(READ_ATTEMPTS):
        names = library.names()
        if not names:
            raise LibraryError(
                f"library '{library.path}' must hold an adapter to route over", found="none",
                remedy="lorary library add",
            )  # fmt: skip
        order = tuple(seats or names)
        before = library.stamps()
        try:
            shapes = {name: library.shapes(name) for name in order}
            layers = build_layers(model, _Adapters(library, order), [names.index(name) for name in order], shapes)
            break
        except (LoraryError, ValueError):
            if attempt == READ_ATTEMPTS - 1 or library.stamps() == before:
                raise
    check_layers(model, shapes)
    return tuple(names), order, layers


def detach(model: Model) -> Model:
    """Take the experts away again; the model computes what it did before `attach`.

    Args:
        model: a routed model, changed in place.

    Returns:
        `model`.

    Raises:
        UsageError: if no experts are seated in it, a `with lorary.routing` or `lorary.trace` block is open, or another
            thread computes with it.
    """
    state, routed = seating(model), cast(nn.Module, model)
    with changing(model):
        check_no_block(state)
        drop_pass_hooks(state)
        unseat(routed, list(state.layers), list(state.handles.values()))
        for handle in state.base_handles:
            handle.remove()
        delattr(model, STATE)
    return model


@contextmanager
def routing(model: Model, setting: Setting | Sequence[Setting]) -> Iterator[Model]:
    """Route by another setting inside a `with` block, or each row of a batch by one of its own.

    The setting is in force in the thread, or asyncio task, that entered the block: several may use one model, each by a
    setting of its own. A thread that is started inside the block does not stand in it, as with `torch.autocast`: it has
    to enter one, or to be started with `contextvars.copy_context().run`.

    Args:
        model: a routed model.
        setting: the name of a router, or fields of `Routing` such as `{"experts": ["sst2"]}`, or `{"preset": "peft"}`;
            fields that are not given keep the value they have. A list gives one setting to each row of the batches
            that follow; a batch of a multiple of that number has that many rows (beams) of each setting in turn.

    Yields:
        `model`.

    Raises:
        UsageError: if no experts are seated in it, or the setting has a field that does not exist.
        RouterError: if the setting cannot be used over these experts.
    """
    state = seating(model)
    before = state.routing
    if isinstance(setting, (str, Mapping, Routing)) or not isinstance(setting, Sequence):
        settings = [merged(before, setting)]
        block = applied(model, state, settings[0])
    elif not setting:
        raise UsageError("a list of routing settings must have one for each row", found="an empty list")
    else:
        settings = [merged(before, row_setting) for row_setting in setting]
        block = applied(model, state, before, settings)
    with block:
        _warn_of_scores(state, settings)
        yield model


def _warn_of_ambiguity(state: Seating) -> None:
    """Say which prototypes a hair's breadth of rounding could turn: routing by them is arbitrary."""
    ambiguous = state.ambiguous()
    if ambiguous:
        expert, path, ratio = ambiguous[0]
        message = (
            f"{len(ambiguous)} prototypes are ambiguous, since their two largest singular values are nearly equal: "
            f"expert '{expert}' at {path} has σ2/σ1 = {ratio:.5f}"
        )
        warnings.warn(message, stacklevel=4)


def _warn_of_targets(state: Seating) -> None:
    """Say which experts adapt which layers, where these differ: in a layer, a rule knows those alone that it has."""
    paths: dict[str, list[str]] = {name: [] for name in state.experts}
    for path, layer in state.layers.items():
        for position in layer.experts:
            paths[state.experts[position]].append(path)
    if groups := different_targets(paths):
        message = (
            f"the experts of library '{state.library.name}' adapt different layers: {groups}. A router that decides in "
            "each layer compares only the experts of that layer; contrast compares each over all of its own"
        )
        warnings.warn(message, stacklevel=4)


def _warn_of_scores(state: Seating, settings: Sequence[Routing]) -> None:
    """Say that a rule which reads scores off weights sees the low-rank part of a DoRA alone."""
    rules = {setting.router: ROUTERS[setting.router] for setting in settings if setting.experts is None}
    names = [name for name, rule in rules.items() if rule.reads and rule.needs != "prepared"]
    doras = {
        state.experts[position]
        for layer in state.layers.values()
        for position, (_, magnitude) in zip(layer.experts, layer.further, strict=True)
        if magnitude is not None
    }
    if names and doras:
        message = (
            f"router '{names[0]}' scores a DoRA by its low-rank part, scaled by its magnitudes; what it does to the "
            f"base's own output counts in the mixture and not in the score: {sorted(doras)[:10]}. A router that "
            "decides per request (auto) does not depend on it"
        )
        warnings.warn(message, stacklevel=4)


@dataclass(frozen=True)
class _Adapters:
    """The adapters of a library, read anew each time they are gone through."""

    library: Library
    names: Sequence[str]

    def __iter__(self) -> Iterator[Adapter]:
        return (self.library.get(name) for name in self.names)
