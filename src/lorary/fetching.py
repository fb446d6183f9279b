"""How a library that lies elsewhere comes here, and how a state of one is kept, for the room of libraries.

The room that knows remotes and objects stands above it. So the door (`lorary/__init__.py`), which knows all rooms, puts
here what fetches one, and what finds a function of that room.
"""

from lorary.errors import UsageError

# As in the door, which imports this.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any


def _refused(url: str) -> "Path":
    raise UsageError("remote libraries must be opened through the package lorary", found=url, remedy="import lorary")


# From the URL of a library to the folder of a copy that is only read.
fetched: "Callable[[str], Path]" = _refused
# From the name of a function of `lorary.remote.snapshots` to the function.
of_snapshots: "Callable[[str], Callable[..., Any]]" = _refused  # type: ignore[assignment]


def is_remote(path: object) -> bool:
    """Whether a path is the URL of something that lies elsewhere."""
    return "://" in str(path) or str(path).startswith("file:")
