"""What a routing setting asks for where another one is in force, and presets."""

from collections.abc import Mapping
from typing import Any

from lorary.errors import UsageError
from lorary.route import ROUTERS
from lorary.route.setting import Routing

# Settings that reproduce somebody else's numbers; what they leave out has its default.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # mttl, the paper's code: factors are mixed, q, k and v of a layer are one fused layer, experts that do nothing
    # keep their seats.
    "paper-2024": {"router": "arrow", "top_k": 4, "mix": "factors", "tie": "concat", "zeros": "keep"},
    # peft.ArrowConfig as it comes.
    "peft": {"router": "arrow", "top_k": 3, "mix": "outputs"},
    # All experts share a request: how far each stands out gives its weight.
    "contrast": {"router": "contrast", "top_k": 10_000, "temperature": 1.0},
}
# What belongs to the router in force, and goes when another one is named.
_ITS_OWN: Mapping[str, Any] = {
    "experts": None, "calibrated": False, "tie": "none", "zeros": "skip", "features": "hidden"
}  # fmt: skip
# Scores in the units of one rule: they mean nothing to another one.
_IN_UNITS = ("threshold", "null")


def merged(before: Routing, setting: "str | Mapping[str, Any] | Routing") -> Routing:
    """What a setting asks for, where another one is in force.

    Args:
        before: gives the fields that are not given; a preset gives all of them itself.
        setting: the name of a router, fields of `Routing`, fields beside a `preset`, or settings as they are.

    Returns:
        The settings.

    Raises:
        UsageError: if the setting has a field that does not exist, or is none.
        RouterError: as `Routing` raises it.
    """
    if isinstance(setting, Routing):
        return setting
    if not isinstance(setting, (str, Mapping)):
        raise UsageError("a routing setting must be a router's name or fields of Routing", found=repr(setting))
    changes: dict[str, Any] = {"router": setting} if isinstance(setting, str) else dict(setting)
    preset = changes.pop("preset", None)
    if preset is not None:
        return Routing.of(**{**preset_fields(preset), **changes})
    if "router" in changes:
        is_same = before.experts is None and changes["router"] == before.router
        changes = {**_its_own(before), **({} if is_same else _exchanged(before, changes["router"])), **changes}
    elif changes.get("experts") is not None:
        changes = {**_undone(before), **changes}
    return before.changed(**changes)


def _exchanged(before: Routing, router: Any) -> dict[str, Any]:
    """What changes beside when another router takes over: bounds in units of the old one, and defaults of both."""
    rule = ROUTERS.get(router) if isinstance(router, str) else None
    return {**dict.fromkeys(_IN_UNITS), **_undone(before), **({} if rule is None else rule.defaults)}


def _undone(setting: Routing) -> dict[str, Any]:
    """The fields that the rule of a setting changes by default, as they are without it."""
    defaults = Routing().fields()
    return {key: defaults[key] for key in _defaults_of(setting)}


def _defaults_of(setting: Routing) -> Mapping[str, Any]:
    """The fields in which the rule of a setting differs from others by default."""
    return {} if setting.experts is not None else ROUTERS[setting.router].defaults


def without_router(setting: Routing) -> dict[str, Any]:
    """The fields of a setting that stay when another router is named, as values of JSON."""
    dropped = {"router", *_its_own(setting), *_IN_UNITS, *_defaults_of(setting)}
    return {key: value for key, value in setting.to_json().items() if key not in dropped}


def in_units(setting: Routing) -> dict[str, dict[str, Any]]:
    """By the name of its router, the fields of a setting that mean something to that rule alone.

    These are bounds in its own units, and what the rule has defaults of its own for.
    """
    fields, own = setting.fields(), _defaults_of(setting)
    kept = {key: fields[key] for key in (*_IN_UNITS, *own) if key in own or fields[key] is not None}
    return {setting.router: kept} if kept and setting.experts is None else {}


def _its_own(setting: Routing) -> dict[str, Any]:
    """What belongs to a router, and goes with it; a layer to decide for tokens does not, one to look at does."""
    return {**_ITS_OWN, **({} if setting.per == "token" else {"at": None})}


def preset_fields(name: str) -> dict[str, Any]:
    """The fields of a preset.

    Raises:
        UsageError: if there is none of that name.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise UsageError("a routing preset must exist", found=repr(name), remedy=f"one of {list(PRESETS)}")
    return dict(PRESETS[name])
