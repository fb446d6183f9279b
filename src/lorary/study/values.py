"""Values of a YAML file made to fit the fields of a dataclass, or refused by name."""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from lorary.errors import UsageError
from lorary.numbers import is_number

_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", NoneType: "null"}


def fields_for(cls: type, document: object, where: str, leave_out: Collection[str] = ()) -> dict[str, Any]:
    """The entries of a mapping as arguments of a dataclass.

    Args:
        cls: the dataclass.
        document: what the file says.
        where: the place in the file, for errors.
        leave_out: fields that the file may not set.

    Returns:
        Arguments by name.

    Raises:
        UsageError: if it is no mapping, a key is unknown, or a value is of the wrong kind.
    """
    hints = get_type_hints(cls)
    known = [field.name for field in fields(cls) if field.name not in leave_out]
    given = check_keys(document, known, where)
    return {key: _fitted(value, hints[key], f"{where.removesuffix(',')}, key '{key}',") for key, value in given.items()}


def check_keys(document: object, known: Collection[str], where: str) -> Mapping[str, Any]:
    """A mapping that has these keys alone.

    Raises:
        UsageError: if it is none, or has another.
    """
    if not isinstance(document, Mapping):
        raise UsageError(f"{where} must be a mapping", found=repr(document)[:80], remedy=f"keys: {', '.join(known)}")
    if unknown := [key for key in document if key not in known]:
        near = difflib.get_close_matches(str(unknown[0]), known, n=1)
        raise UsageError(
            f"{where} must have known keys only",
            found=unknown[0],
            remedy=f"did you mean {near[0]}?" if near else f"keys: {', '.join(known)}",
        )
    return document


def is_positive(value: object) -> bool:
    """Whether a value is a finite number above 0."""
    return is_number(value) and isinstance(value, (int, float)) and value > 0


def _fitted(value: Any, hint: Any, where: str) -> Any:
    kinds = get_args(hint) if get_origin(hint) is UnionType else (hint,)
    for kind in kinds:
        fits, fitted = _try(value, kind, where)
        if fits:
            return fitted
    words = " or ".join(_words(kind) for kind in kinds)
    raise UsageError(f"{where} must be {words}", found=repr(value)[:80])


def _try(value: Any, kind: Any, where: str) -> tuple[bool, Any]:
    """Whether a value is of a kind, and the value as that."""
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            return False, None
        inner = get_args(kind)[0]
        return True, tuple(_fitted(entry, inner, where) for entry in value)
    if get_origin(kind) is not None:
        inner = get_args(kind)[1]
        if not isinstance(value, Mapping) or inner is Any:
            return isinstance(value, Mapping), value
        return True, {key: _fitted(entry, inner, where) for key, entry in value.items()}
    if kind is float:
        return _number(value)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool)), value


def _number(value: Any) -> tuple[bool, float]:
    # YAML takes 1e-4, without a point, for a text.
    try:
        return not isinstance(value, bool) and isinstance(value, (int, float, str)), float(value)
    except (TypeError, ValueError, OverflowError):
        return False, 0.0


def _words(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return "a list"
    return "a mapping" if get_origin(kind) is not None else _WORDS[kind]
