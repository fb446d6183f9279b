"""How a library that lies elsewhere comes here, for the room of libraries.

The room that knows remotes stands above it. So the door (`lorary/__init__.py`), which knows all rooms, puts here what
fetches one.
"""

from collections.abc import Callable
from pathlib import Path

from lorary.errors import UsageError


def _refused(url: str) -> Path:
    raise UsageError("remote libraries must be opened through the package lorary", found=url, remedy="import lorary")


# From the URL of a library to the folder of a copy that is only read.
fetched: Callable[[str], Path] = _refused


def is_remote(path: object) -> bool:
    """Whether a path is the URL of something that lies elsewhere."""
    return "://" in str(path) or str(path).startswith("file:")
