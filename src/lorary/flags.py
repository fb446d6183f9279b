"""Settings and their options from one definition: a field of a dataclass gives default, range, option and help.

A field that is written as `flag(4, above=0)` is checked by `check_flags`, refused under the name of its option, and
made an option of the command line by `lorary.cli.flags`, with its sentence under `Args:` of the class as the help.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, get_args

from lorary.errors import UsageError, did_you_mean
from lorary.numbers import check_count, check_number

# By settings class, the fields that were given, parsed.
OptionValues = Mapping[type, Mapping[str, Any]]

_KEY = "flag"
_BOUNDS = ("least", "above", "below", "most")


@dataclass(frozen=True)
class Flag:
    """What a field of settings says beyond its default.

    Args:
        least: the smallest value allowed; None leaves it to `above`.
        above: a bound that is itself not allowed.
        below: the same at the other end.
        most: the largest value allowed.
        choices: the words allowed.
        option: of the command line, where it is not spelled as the field; empty where there is none.
        methods: those that look at the field; all where there are none.
        metavar: what stands for the value in the help.
        parse: makes a value of the text that was given.
        is_repeated: give the option once for each entry, in place of one list with commas.
    """

    least: int | float | None = None
    above: int | float | None = None
    below: int | float | None = None
    most: int | float | None = None
    choices: Sequence[str] = ()
    option: str | None = None
    methods: Sequence[str] = ()
    metavar: str | None = None
    parse: Callable[[str], Any] | None = None
    is_repeated: bool = False


def flag(default: Any, **rules: Any) -> Any:
    """A field of settings with its rules.

    Args:
        default: its value.
        rules: fields of `Flag`.
    """
    return field(default=default, metadata={_KEY: Flag(**rules)})


def flags_of(settings: type) -> dict[str, Flag]:
    """The rules of every field of a settings class, by name."""
    return {each.name: each.metadata.get(_KEY, Flag()) for each in fields(settings)}


def option_of(settings: type, name: str) -> str:
    """The option that sets a field; the field's own name where there is none."""
    option = flags_of(settings)[name].option
    return f"--{name.replace('_', '-')}" if option is None else option or name


def defaults_of(settings: type) -> dict[str, Any]:
    """The default of every field that has one."""
    values = {
        each.name: each.default_factory() if each.default_factory is not MISSING else each.default
        for each in fields(settings)
    }
    return {name: value for name, value in values.items() if value is not MISSING}


def check_flags(settings: Any) -> None:
    """Check every field that has a range or choices; None passes where the field may be None.

    Raises:
        UsageError: naming the option.
    """
    kind = type(settings)
    for each in fields(kind):
        rules, value, name = each.metadata.get(_KEY), getattr(settings, each.name), option_of(kind, each.name)
        types = get_args(each.type) or (each.type,)
        if rules is None or (value is None and type(None) in types):
            continue
        bounds = {key: bound for key in _BOUNDS if (bound := getattr(rules, key)) is not None}
        if rules.choices:
            check_choice(name, value, rules.choices)
        elif bounds and int in types:
            check_count(name, value, **bounds)
        elif bounds:
            check_number(name, value, **bounds)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a word that is not among those allowed.

    Raises:
        UsageError: naming what was likely meant.
    """
    if value not in choices:
        raise UsageError(
            f"{name} must be one of {', '.join(choices)}", found=value, remedy=did_you_mean(str(value), choices)
        )


def check_methods(settings: Any, method: str, *, spelled: Mapping[str, str] | None = None) -> None:
    """Refuse fields that were changed although the method does not look at them.

    Args:
        settings: whose fields name their `methods`.
        method: that was chosen.
        spelled: how fields are asked for, where it is not by their option alone.

    Raises:
        UsageError: naming the first of them.
    """
    kind = type(settings)
    defaults = defaults_of(kind)
    for name, rules in flags_of(kind).items():
        if rules.methods and method not in rules.methods and getattr(settings, name) != defaults[name]:
            option = (spelled or {}).get(name, option_of(kind, name))
            raise UsageError(
                f"{option} needs --method {' or '.join(rules.methods)}",
                found=f"--method {method}",
                remedy="leave it out",
            )


def helps_of(settings: type, *, options: bool = True, mark: str = "") -> dict[str, str]:
    """The sentence of every field, from `Args:` in the docstring of the class, without its full stop.

    Args:
        settings: the class.
        options: call other fields by their options, as a help of a command does.
        mark: what stands around code then.
    """
    _, _, text = inspect.cleandoc(settings.__doc__ or "").partition("Args:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", text, re.MULTILINE)
    flags = {each.name for each in fields(settings) if _KEY in each.metadata}

    def spelled(match: re.Match[str]) -> str:
        return f"{mark}{option_of(settings, match[1]) if match[1] in flags else match[1]}{mark}"

    helps = {name: " ".join(sentence.split()) for name, sentence in entries}
    if options:
        helps = {name: re.sub(r"`([^`]*)`", spelled, sentence) for name, sentence in helps.items()}
    return {name: re.sub(r"(?<!\.)\.$", "", sentence) for name, sentence in helps.items()}
