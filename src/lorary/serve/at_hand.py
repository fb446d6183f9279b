"""Which routers can decide at once: no request may start minutes of measuring."""

from lorary.errors import LoraryError
from lorary.library.prepared import was_prepared_before
from lorary.library.store import Library
from lorary.model.prepared import prepared_marks
from lorary.route import ROUTERS
from lorary.route.presets import merged
from lorary.route.setting import Routing


def routers_at_hand(default: Routing, library: Library) -> list[str]:
    """The routers that have all they need, that of the default among them.

    Args:
        default: the setting in force; what it needs was read or measured when the experts were seated.
        library: where what rules need is kept.
    """
    return [name for name in ROUTERS if name != "base" and (name == default.router or _has_all(name, default, library))]


def _has_all(router: str, default: Routing, library: Library) -> bool:
    try:
        return is_at_hand(merged(default, router), library)
    except LoraryError:  # it cannot run with what stays of the default's fields
        return False


def is_at_hand(setting: Routing, library: Library) -> bool:
    """Whether what a setting needs beyond weights lies in the library.

    Args:
        setting: the router.
        library: the library.
    """
    if setting.experts is None and (tries := ROUTERS[setting.router].tries):
        return any(is_at_hand(setting.changed(router=router), library) for router in tries)
    data = setting.data
    if data is None:
        return True
    if data.has_yardstick and all(was_prepared_before(library, data.yardstick_kind, name) for name in library.names()):
        return True
    marks = prepared_marks(setting, library)
    is_yardstick = "yardstick" in marks.get("", {})  # which is not measured yet
    return bool(marks) and all(marks.values()) and not is_yardstick
