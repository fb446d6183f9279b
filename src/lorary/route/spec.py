"""Routers as people write them in a list: `arrow`, `arrow[top_k=2,temperature=0.5]`, `experts[sst2+trec]`, `oracle`."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lorary.errors import RouterError, UsageError, did_you_mean
from lorary.route import ROUTERS
from lorary.route.setting import FIELDS

# The one expert of the task: told what no router knows.
ORACLE = "oracle"
# The same, or the base where that does better on the rows by which the oracle of a held-out task is chosen.
ORACLE_OR_BASE = "oracle-or-base"
# One expert for all tasks.
BEST_SINGLE = "best-single"
# The oracle's expert with factors of the same norms and no content.
RANDOM = "random"
# What routers are held against. They are chosen by rows of the tasks, and take no settings.
REFERENCES = (ORACLE, ORACLE_OR_BASE, BEST_SINGLE, RANDOM)
# Experts by name, alike and everywhere.
EXPERTS = "experts"

# Lists of experts: names with a separator between, or JSON where experts have weights.
_NAMES = ("experts", "allow", "general")
_NUMBERS = ("top_k", "temperature", "top_p", "threshold", "null", "candidates")
# Fields that a router cannot be without.
_NEVER_NULL = ("router", "top_k", "temperature", "mix", "experts", "preset")
_FIELDS = ("preset", *FIELDS)
_OPENING, _CLOSING = "[{", "]}"


@dataclass(frozen=True)
class RouterSpec:
    """A router as it was written.

    Args:
        name: a name in `lorary.route.ROUTERS` or `REFERENCES`, or `experts`.
        fields: fields of `Routing`, and `preset`, by which it differs from what all routers are given.
        experts: the names, for `experts`.
    """

    name: str
    fields: Mapping[str, Any]
    experts: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The one way to write it: fields in the order of `Routing`, numbers short.

        >>> parse_spec("arrow[ temperature=0.50, top_k=2 ]").label
        'arrow[top_k=2,temperature=0.5]'
        """
        body = "+".join(self.experts)
        if self.fields:
            body = ",".join(f"{key}={_written(self.fields[key])}" for key in _FIELDS if key in self.fields)
        return f"{self.name}[{body}]" if body else self.name


def split_specs(text: str) -> list[str]:
    """The routers of a list with commas between; commas inside brackets are a router's own.

    >>> split_specs("base, arrow[top_k=2,temperature=0.5],oracle")
    ['base', 'arrow[top_k=2,temperature=0.5]', 'oracle']
    """
    return [part for part in (piece.strip() for piece in _pieces(text)) if part]


def parse_spec(text: str) -> RouterSpec:
    """What a router is asked for.

    Args:
        text: `NAME`, `NAME[FIELD=VALUE,...]`, `experts[NAME+NAME...]`, or one of `REFERENCES`. A value is JSON where it
            reads as such, else text; names of experts have `+` between them.

    Returns:
        The router; whether it can run so is found out when its `Routing` is made.

    Raises:
        RouterError: if there is no such router.
        UsageError: if brackets or fields are not as they must be.
    """
    name, has_brackets, brackets = text.strip().partition("[")
    name, body = name.strip(), brackets.removesuffix("]").strip()
    names = [*ROUTERS, *REFERENCES]
    if name not in (*names, EXPERTS):
        raise RouterError(
            "a router must exist",
            found=name,
            remedy=did_you_mean(name, names, remedy=f"some of {names}, or experts[NAME]"),
        )
    if has_brackets and not (brackets.endswith("]") and body):
        raise UsageError(
            "the brackets of a router must hold something and be closed", found=text, remedy="arrow[top_k=2], or arrow"
        )
    if name == EXPERTS:
        return RouterSpec(name, {}, _expert_names(body, text))
    if has_brackets and name in (*REFERENCES, "base"):
        raise UsageError(f"'{name}' has no settings", found=text, remedy=f"write {name}")
    settings: dict[str, Any] = {}
    for piece in _pieces(body) if body else ():
        key, is_pair, value = piece.partition("=")
        key = key.strip().replace("-", "_")
        if not is_pair or key in ("router", "experts") or key in settings:
            raise UsageError(
                "the brackets of a router must hold FIELD=VALUE, each field once, neither router nor experts",
                found=text,
                remedy="for example arrow[top_k=2,temperature=0.5], or experts[NAME]",
            )
        settings[key] = field_value(key, value.strip(), separator="+")
    return RouterSpec(name, settings)


def field_value(key: str, text: str, separator: str = ",") -> Any:
    """The value of a field of `Routing`, or of `preset`, out of text.

    Args:
        key: the field.
        text: JSON where it reads as such (4, 0.9, true, null), else the text itself; experts are names with the
            separator between them, or JSON.
        separator: between names.

    Raises:
        UsageError: if there is no such field, or the value cannot be its own.
    """
    if key not in _FIELDS:
        raise UsageError("it must name a field of a routing setting", found=key, remedy=f"one of {list(_FIELDS)}")
    if key in _NAMES and not text.startswith(("[", "{")) and text != "null":
        return [name.strip() for name in text.split(separator) if name.strip()]
    value = _read(text)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if key in _NUMBERS and not (is_number or value is None or (key == "temperature" and isinstance(value, dict))):
        raise UsageError(f"{key} must be a number", found=text, remedy="written as 4 or 0.5")
    if value is None and key in _NEVER_NULL:
        raise UsageError(f"{key} must have a value", found="null", remedy="name a router to go back to one")
    return value


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _expert_names(body: str, text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in body.split("+"))
    if not all(names) or len(set(names)) != len(names) or "," in body:
        raise UsageError(
            "experts[...] must hold different names with + between them", found=text, remedy="experts[sst2+trec]"
        )
    return names


def _pieces(text: str) -> Iterator[str]:
    """The text cut at its commas, brackets and quoted strings left whole."""
    depth, is_quoted, start = 0, False, 0
    for i, letter in enumerate(text):
        if letter == '"':
            is_quoted = not is_quoted
        elif is_quoted:
            continue
        elif letter in _OPENING:
            depth += 1
        elif letter in _CLOSING:
            depth -= 1
        elif letter == "," and depth == 0:
            yield text[start:i]
            start = i + 1
    yield text[start:]


def _written(value: Any) -> str:
    """A value as `field_value` reads it."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "+".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.12g}"
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
