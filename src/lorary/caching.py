"""Where Lorary keeps what it can make again."""

import os
from pathlib import Path

from lorary.errors import UsageError


def cache_folder() -> Path:
    """Where Lorary keeps what it can make again: LORARY_CACHE, else XDG_CACHE_HOME/lorary, else ~/.cache/lorary.

    Raises:
        UsageError: if none of these says where.
    """
    if own := os.environ.get("LORARY_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "lorary"
    try:
        return Path.home() / ".cache" / "lorary"
    except RuntimeError as error:  # neither HOME nor an entry in the user database
        raise UsageError(
            "there must be a folder for what Lorary keeps",
            found="no home folder",
            remedy="set LORARY_CACHE to a folder",
        ) from error
