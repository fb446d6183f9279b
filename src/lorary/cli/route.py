"""Settings of a router from the command line: one option for every field there is."""

import json
from collections.abc import Sequence
from typing import Any

from lorary.cli.options import split_names

# Lists of experts: `a,b`, or JSON where a name holds a comma or experts have weights.
_NAMES = ("experts", "allow", "general")


def route_fields(route: Sequence[str] | None, **options: Any) -> dict[str, Any]:
    """What `--route` and the options for single fields ask for.

    Args:
        route: `FIELD=VALUE` each. A value is JSON where it reads as such (4, 0.9, true, null), else text.
        options: fields that have options of their own; None where they were not given.

    Returns:
        Fields of `lorary.model.setting.Routing`, and `preset`.

    Raises:
        UsageError: if one is no `FIELD=VALUE`, there is no such field, or it is given twice.
    """
    from lorary.errors import UsageError

    found = {key: value for key, value in options.items() if value is not None}
    for text in route or ():
        key, is_pair, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not is_pair:
            raise UsageError("--route must be FIELD=VALUE", found=text, remedy="for example --route top_p=0.9")
        _check_field(key)
        if key in found:
            raise UsageError(
                f"'{key}' must be given once", found=f"--route {text} beside another", remedy="leave one out"
            )
        found[key] = _value(key, value.strip())
    return found


def _check_field(key: str) -> None:
    from dataclasses import fields

    from lorary.errors import UsageError
    from lorary.model.setting import Routing

    known = ["preset", *(field.name for field in fields(Routing))]
    if key not in known:
        raise UsageError("--route must name a field of a routing setting", found=key, remedy=f"one of {known}")


def _value(key: str, text: str) -> Any:
    from lorary.errors import UsageError

    if key in _NAMES and not text.startswith(("[", "{")) and text != "null":
        return split_names(text)
    try:
        value = json.loads(text)
    except ValueError:
        return text
    if value is None and key in ("router", "top_k", "temperature", "mix", "experts", "preset"):
        raise UsageError(f"--route {key} must have a value", found="null", remedy="name a router to go back to one")
    return value
