"""Settings of a router from the command line: one option for every field there is."""

from collections.abc import Sequence
from typing import Any


def route_fields(route: Sequence[str] | None = None, **options: Any) -> dict[str, Any]:
    """What `--route` and the options for single fields ask for.

    Args:
        route: `FIELD=VALUE` each. A value is JSON where it reads as such (4, 0.9, true, null), else text.
        options: fields that have options of their own; None where they were not given.

    Returns:
        Fields of `lorary.route.setting.FIELDS`, and `preset`.

    Raises:
        UsageError: if a text is not `FIELD=VALUE`, there is no such field, or it is given twice.
    """
    from lorary.errors import UsageError
    from lorary.route.spec import field_value

    settings = {key: value for key, value in options.items() if value is not None}
    for text in route or ():
        key, is_pair, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not is_pair:
            raise UsageError("--route must be FIELD=VALUE", found=text, remedy="for example --route top_p=0.9")
        field = field_value(key, value.strip())
        if key in settings:
            raise UsageError(
                f"'{key}' must be given once", found=f"--route {text} beside another", remedy="leave one out"
            )
        settings[key] = field
    return settings
