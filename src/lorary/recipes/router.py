"""`lorary library router`: what router a library has for callers who name none."""

from collections.abc import Mapping
from typing import Any

from lorary.errors import RouterError
from lorary.library.document import DEFAULT_ROUTER
from lorary.library.store import Library
from lorary.route.presets import merged
from lorary.route.setting import Routing


def run_router(library_path: str, changes: Mapping[str, Any], *, reset: bool = False) -> dict[str, Any]:
    """Change the default router of a library, or only look at it.

    Args:
        library_path: folder of the library.
        changes: fields of `Routing`, or fields beside a `preset`; others keep their value. Nothing is written where
            there are none.
        reset: begin from the router of a new library.

    Returns:
        The settings, as they stand in library.json.

    Raises:
        UsageError: if a field does not exist, is out of range or makes no sense beside another.
        RouterError: if there is no such router, or it names an expert that the library has not.
    """
    library = Library.open(library_path)
    routing = merged(Routing.of(**(DEFAULT_ROUTER if reset else library.default_router)), changes)
    settings = {key: value for key, value in routing.to_json().items() if value is not None}
    if changes or reset:
        _check_names(routing, library)
        library.set_default_router(settings)
    return settings


def _check_names(setting: Routing, library: Library) -> None:
    if missing := sorted(setting.named - set(library.names())):
        raise RouterError("a named expert must be in the library", found=missing, remedy=f"it has {library.names()}")
