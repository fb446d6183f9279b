"""Adapters that were trained on top of another adapter: by what they name as their base."""

import os
import re
import warnings
from collections.abc import Collection
from pathlib import Path

from lorary.adapter import Adapter
from lorary.errors import BaseModelError
from lorary.formats.peft_reasons import CONFIG_FILE, WEIGHTS_FILE

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def check_not_stacked(
    adapter: Adapter, source: Path, base: str, names: Collection[str], *, force_base: bool = False
) -> bool:
    """Refuse an adapter whose base is another adapter: without that one it computes something else.

    Args:
        adapter: as read.
        source: the folder it comes from, which relative paths may start from.
        base: name of the library's base.
        names: of the adapters in the library.
        force_base: take it with a warning.

    Returns:
        Whether it was trained on top of another adapter, and is taken by force.

    Raises:
        BaseModelError: naming the adapter that it was trained on.
    """
    named = adapter.config.get("base_model_name_or_path")
    if not isinstance(named, str) or named in ("", base):
        return False
    parent = _adapter_called(named, source, base, names)
    if parent is None:
        return False
    if not force_base:
        raise BaseModelError(
            f"adapter '{adapter.name}' must have been trained on a base model, not on top of another adapter",
            found=f"base_model_name_or_path = {named[:200]!r}, which is {parent}",
            remedy="merge that adapter into the base and make a library over the result, or force it (--force-base)",
        )
    warnings.warn(
        f"adapter '{adapter.name}' was trained on top of {parent}, and is taken without it: by force.", stacklevel=5
    )
    return True


def _adapter_called(named: str, source: Path, base: str, names: Collection[str]) -> str | None:
    """What adapter a name of a base is, in words; None where it is none that can be found here."""
    for start in (Path(), source.parent, source):
        folder = start / os.path.expanduser(named)
        if is_file(folder / CONFIG_FILE) or is_file(folder / WEIGHTS_FILE):
            return f"the folder of an adapter, {folder}"
    if is_file(Path(named) / "config.json"):
        return None
    if HUB_ID.fullmatch(named) and _is_adapter_in_cache(named):
        return f"the adapter {named} of the Hub, by its copy here"
    last = re.split(r"[/\\]", named.rstrip("/\\"))[-1]
    if last in names and last != re.split(r"[/\\]", base)[-1]:
        return f"called as the adapter '{last}' of this library"
    return None


def _is_adapter_in_cache(repo: str) -> bool:
    from huggingface_hub import try_to_load_from_cache  # few adapters name a Hub id that is not the library's base

    try:
        return isinstance(try_to_load_from_cache(repo, CONFIG_FILE), str)
    except (ValueError, OSError):
        return False


def is_file(path: Path) -> bool:
    """Whether a file is there; not where it may not be looked at, or the path cannot be one."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
