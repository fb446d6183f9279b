"""Settings as a user could give them, without the type checker of the tests, which refuses some of them first."""

from typing import Any

from lorary.route.setting import FIELDS, Routing


def check_unchecked(fields: dict[str, Any]) -> None:
    """Let a routing setting with these fields check itself."""
    made = Routing()
    for key, value in fields.items():
        part, _, name = FIELDS[key].rpartition(".")
        object.__setattr__(getattr(made, part) if part else made, name, value)
    for part_made in (made.choosing, made.options, made.general, made):
        part_made.__post_init__()
