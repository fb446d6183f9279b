"""Which adapters a path stands for: a folder of one, a folder of several, a library, or a pattern of these."""

import glob
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from lorary.errors import UsageError
from lorary.formats.peft_reasons import CONFIG_FILE
from lorary.library.layout import ADAPTERS, LIBRARY_FILE


def adapter_folders(paths: Sequence[str]) -> list[Path]:
    """The folders of adapters that paths stand for, each once, in the order of the paths.

    A folder with an adapter_config.json is one adapter. Of another one, the folders in it that have one are; of a
    library, its adapters. A folder without any stays as it is, and whoever reads it says what is missing.

    Args:
        paths: folders, or patterns (`*`, `?`, `[...]`, `**`) where nothing has that very name.

    Raises:
        UsageError: if nothing matches a pattern.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        for place in _matching(path):
            for folder in _adapters_in(place):
                folders.setdefault(folder.resolve(), folder)
    return list(folders.values())


def _matching(path: str) -> list[Path]:
    if os.path.lexists(path) or not glob.has_magic(path):
        return [Path(path)]
    matches = sorted(glob.glob(path, recursive=True))
    if not matches:
        raise UsageError("a pattern must match folders of adapters", found=ascii(path), remedy="check the path")
    return [Path(match) for match in matches]


def _adapters_in(folder: Path) -> list[Path]:
    if (folder / LIBRARY_FILE).is_file():
        return _adapters_below(folder / ADAPTERS) or [folder]
    below = _adapters_below(folder)
    if not (folder / CONFIG_FILE).exists():
        return below or [folder]
    if below:
        names = ", ".join(adapter.name for adapter in below[:5])
        warnings.warn(
            f"{folder} is an adapter, and those in it ({names}) are left out: name them to add them", stacklevel=2
        )
    return [folder]


def _adapters_below(folder: Path) -> list[Path]:
    try:
        return sorted(place for place in folder.iterdir() if (place / CONFIG_FILE).is_file())
    except OSError:  # no folder, or one that may not be read: whoever reads the adapter says so
        return []
