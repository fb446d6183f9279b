"""`lorary which` and `lorary.which`: opens a library and its base, and asks each expert, the base and the router."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorary.evaluate.prompts import Prompt
from lorary.evaluate.settings import WhichSettings
from lorary.evaluate.which import WhichResult, which_library
from lorary.flags import OptionValues
from lorary.keywords import with_settings
from lorary.library.store import Library
from lorary.model.base import Base
from lorary.recipes.base_options import BaseOptions
from lorary.recipes.inputs import base_at_hand, library_of, prompts_of
from lorary.route.setting import FIELDS


@with_settings(WhichSettings, BaseOptions, omit=("base",), also=(*FIELDS, "preset"))
def which(
    library: Library | str | Path,
    prompts: str | Path | Prompt | Sequence[str | Prompt],
    *,
    answer: str | None = None,
    base: Base | str | Path | None = None,
    options: OptionValues,
    route: Mapping[str, Any],
) -> WhichResult:
    """Answer prompts by each expert alone, by the base and by the router, side by side.

    Args:
        library: the library, or the path of its folder.
        prompts: a text, or several; a `pathlib.Path` is a file of them.
        answer: the right answer to the one prompt.
        base: the base model, loaded or by reference; the library's own where None. A loaded one is left as it was.
        options: the settings.
        route: a router, experts, a preset and fields of a routing setting, as `lorary.attach` takes them.

    Returns:
        The answers, with the router's weights, the losses of right answers, and a verdict for each prompt. It shows
        them as tables.

    Raises:
        UsageError: if a text is empty or too long, or an argument does not exist or is out of range.
        LoraryError: as for `lorary.attach`.
    """
    load, settings = BaseOptions(**options[BaseOptions]), WhichSettings(**options[WhichSettings])
    texts = prompts_of(prompts, answer, route.get("experts"))
    started = time.perf_counter()
    opened = library_of(library)
    loaded = base_at_hand(opened, base, load)
    load_seconds = time.perf_counter() - started
    result = which_library(loaded, opened, texts, settings, force_base=load.force_base, **route)
    return replace(result, load_seconds=load_seconds)
