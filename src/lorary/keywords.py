"""Settings classes as keyword arguments of a function: names, defaults and sentences come from the class alone.

The command line makes options of the same classes (`lorary.cli.flags`), so that Python and commands take the same.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import wraps
from typing import Any

from lorary.errors import UsageError, did_you_mean
from lorary.flags import defaults_of, helps_of


def with_settings(*classes: type, omit: tuple[str, ...] = (), also: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Let a function take the fields of settings classes as keyword arguments; None leaves a field at its default.

    The function itself has a parameter `options`, which gets by class what was given, and where `also` names any, a
    parameter `route` for those. Its other parameters stay as they are.

    Args:
        classes: the settings.
        omit: fields that are no arguments.
        also: names of further keyword arguments, the fields of a routing setting.

    Returns:
        A decorator. The function it makes raises UsageError for an argument that does not exist, and names what was
        likely meant.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        place = {each.name: settings for settings in classes for each in fields(settings) if each.name not in omit}
        signature = inspect.signature(function)
        parameters = [p for p in signature.parameters.values() if p.name not in ("options", "route")]
        names = [*(p.name for p in parameters), *place, *also]

        @wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            options: dict[type, dict[str, Any]] = {settings: {} for settings in classes}
            route: dict[str, Any] = {}
            passed: dict[str, Any] = {}
            for name, value in keywords.items():
                if name not in names:
                    raise UsageError(
                        f"lorary.{function.__name__} must be called with arguments that it has",
                        found=name,
                        remedy=did_you_mean(name, names, remedy=f"help(lorary.{function.__name__}) lists them"),
                    )
                if name not in place:
                    (route if name in also else passed)[name] = value
                elif value is not None:
                    options[place[name]][name] = value
            return function(*arguments, options=options, **({"route": route} if also else {}), **passed)

        call.__signature__ = _signature(signature, parameters, classes, place, bool(also))  # type: ignore[attr-defined]
        call.__doc__ = _documented(function, classes, place)
        return call

    return decorate


def _signature(
    signature: inspect.Signature,
    parameters: list[inspect.Parameter],
    classes: tuple[type, ...],
    place: Mapping[str, type],
    is_routed: bool,
) -> inspect.Signature:
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    settings = [
        inspect.Parameter(
            each.name, keyword_only, annotation=each.type,
            default=defaults_of(kind).get(each.name, inspect.Parameter.empty),
        )
        for kind in classes
        for each in fields(kind)
        if place.get(each.name) is kind
    ]  # fmt: skip
    route = [inspect.Parameter("route", inspect.Parameter.VAR_KEYWORD, annotation=Any)] if is_routed else []
    return signature.replace(parameters=[*parameters, *settings, *route])


def _documented(function: Callable[..., Any], classes: tuple[type, ...], place: Mapping[str, type]) -> str:
    """The docstring with a sentence for each setting in the place of that for `options`."""
    sentences = [
        f"    {name}: {sentence}" + "." * (not sentence.endswith("..."))
        for kind in classes
        for name, sentence in helps_of(kind, options=False).items()
        if place.get(name) is kind
    ]
    lines = inspect.cleandoc(function.__doc__ or "").splitlines()
    return "\n".join(text for line in lines for text in (sentences if line.startswith("    options:") else [line]))
