"""Values of a study's file checked by pydantic against the fields of dataclasses, or refused by place and value."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Annotated, Any, NotRequired, Union, get_args, get_origin, get_type_hints

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    Strict,
    StrictBool,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from lorary.errors import UsageError
from lorary.numbers import is_number

STAGE_KINDS = ("build", "evaluate", "adapt", "drift")
# What a value must be where pydantic gives such an error.
WORDS = {
    "int_type": "a whole number", "float_type": "a number", "float_parsing": "a number", "string_type": "a text",
    "bool_type": "true or false", "none_required": "null", "list_type": "a list", "dict_type": "a mapping",
    "greater_than": "a number above 0",
}  # fmt: skip
Path = tuple[int | str, ...]


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("float_type", "a bool")
    return value


def _positive(value: Any) -> Any:
    if not (is_number(value) and value > 0):
        raise PydanticCustomError("greater_than", "not above 0")
    return float(value)


# YAML takes 1e-4, without a point, for a text; pydantic takes it for a number.
NUMBER = Annotated[float, BeforeValidator(_not_bool)]
POSITIVE = Annotated[Any, AfterValidator(_positive)]
# Written so, null is one of the alternatives that an error lists.
_KINDS: Mapping[Any, Any] = {
    int: StrictInt, float: NUMBER, str: StrictStr, bool: StrictBool, NoneType: Annotated[None, Field()]
}  # fmt: skip


def kind_of(hint: Any) -> Any:
    """A type as pydantic checks it: a value of another kind is refused, not converted."""
    if (origin := get_origin(hint)) is Annotated:
        return hint
    inner = tuple(map(kind_of, get_args(hint)))
    if origin is UnionType:
        return Union[inner]  # noqa: UP007 (of a tuple)
    if origin is tuple:
        return Annotated[list[inner[0]], Strict(), AfterValidator(tuple)]  # type: ignore[valid-type]
    return dict[inner] if origin is Mapping else _KINDS.get(hint, hint)  # type: ignore[valid-type, misc]


def mapping_of(name: str, needed: Collection[str] = (), /, **kinds: Any) -> Any:
    """The type of a mapping with these keys alone; only the needed ones must be there."""

    def check(document: Any) -> Any:
        if isinstance(document, Mapping) and (unknown := [key for key in document if key not in kinds]):
            raise PydanticCustomError("unknown_key", "unknown", {"key": unknown[0], "known": list(kinds)})
        return document

    typed = {key: kind_of(kind) if key in needed else NotRequired[kind_of(kind)] for key, kind in kinds.items()}
    return Annotated[TypedDict(name, typed), BeforeValidator(check)]  # type: ignore[operator]


def mapping_for(cls: Any, leave_out: Collection[str] = (), /, **further: Any) -> Any:
    """The type of a mapping whose keys are fields of a dataclass, and others; a field without a default is needed."""
    hints, chosen = get_type_hints(cls), [entry for entry in fields(cls) if entry.name not in {*leave_out, *further}]
    needed = [entry.name for entry in chosen if entry.default is MISSING and entry.default_factory is MISSING]
    return mapping_of(cls.__name__, needed, **{entry.name: hints[entry.name] for entry in chosen}, **further)


def validated(kind: Any, document: Any, where: str) -> Any:
    """What the file says at a place, as a type.

    Raises:
        UsageError: if a key is unknown or missing, or a value is of the wrong kind.
    """
    try:
        return TypeAdapter(kind).validate_python(document)
    except ValidationError as error:
        raise _refusal([(_path(entry["loc"], document), entry) for entry in error.errors()], document, where) from error


def stage_kinds(entry: object) -> list[str]:
    """The kinds of stage that an entry of `stages` names: one, if it is right."""
    return [kind for kind in STAGE_KINDS if isinstance(entry, Mapping) and kind in entry]


def stage_title(entry: Any) -> str:
    """What stands behind the number of a stage: ` (build: private)`."""
    return "".join(f" ({kind}: {entry[kind]})" for kind in stage_kinds(entry)[:1])


def _path(loc: Path, document: Any) -> Path:
    """Where in the document an error is: without the names that pydantic gives to the alternatives of a union."""
    path: Path = ()
    for step in loc:
        if step in document if isinstance(document, Mapping) else isinstance(document, list) and isinstance(step, int):
            path, document = (*path, step), document[step]
    return path


def _refusal(errors: Sequence[tuple[Path, Any]], document: Any, where: str) -> UsageError:
    """The first error; of the alternatives of a union those that read most of the value."""
    first = errors[0][0]
    path = max((path for path, _ in errors if path[: len(first)] == first), key=len)
    alternatives = [error for error_path, error in errors if error_path == path]
    error = alternatives[0]
    place, value = _place(path, document, where, is_key=error["type"] in WORDS.keys() - {"list_type", "dict_type"})
    if error["type"] == "unknown_key":
        unknown, known_keys = error["ctx"]["key"], error["ctx"]["known"]
        near = difflib.get_close_matches(unknown, known_keys, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"keys: {', '.join(known_keys)}"
        return UsageError(f"{place} must have known keys only", found=unknown, remedy=remedy)
    if error["type"] == "missing":
        missing = [alternative["loc"][-1] for alternative in alternatives if alternative["type"] == "missing"]
        return UsageError(f"{place} must say {', '.join(missing)}", found="nothing of the kind")
    if error["type"] == "union_tag_not_found":
        keys = f"{', '.join(STAGE_KINDS)}, with the stage's name"
        shown = ", ".join(value) if isinstance(value, Mapping) else repr(value)[:80]
        return UsageError(f"{place} must have one of the keys {keys}", found=shown)
    words = dict.fromkeys(WORDS.get(alternative["type"], alternative["msg"]) for alternative in alternatives)
    return UsageError(f"{place} must be {' or '.join(words)}", found=repr(value)[:80])


def _place(path: Path, document: Any, where: str, *, is_key: bool) -> tuple[str, Any]:
    """A place in the file in words, `study 'mine', stages[4] (build: other), key 'tasks',`, and what is there."""
    parts = [where]
    for number, step in enumerate(path):
        document = document[step]
        if isinstance(step, int):
            parts[-1] += f"[{step}]{stage_title(document) if path[0] == 'stages' else ''}"
        elif path[:number] == ("tasks",):
            parts[-1] += f".{step}"
        else:
            parts.append(f"key '{step}'" if is_key and number == len(path) - 1 else step)
    return ", ".join(parts) + "," * (len(parts) > 1), document
