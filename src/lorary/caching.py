"""Where Lorary keeps what it can make again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where Lorary keeps what it can make again: LORARY_CACHE, else XDG_CACHE_HOME/lorary, else ~/.cache/lorary."""
    if own := os.environ.get("LORARY_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "lorary"
