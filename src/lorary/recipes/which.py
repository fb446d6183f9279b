"""`lorary which` and `lorary.which`: open a library and its base, and ask each expert, the base and the router."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorary.errors import UsageError
from lorary.evaluate.prompts import Prompt
from lorary.evaluate.which import WhichResult, check_prompts, which_library
from lorary.library.opening import base_of
from lorary.library.store import Library
from lorary.model.base import Base, load_base
from lorary.recipes.base_options import BaseOptions


def which(
    library: Library | str | Path,
    prompts: str | Prompt | Sequence[str | Prompt],
    *,
    base: Base | str | Path | None = None,
    template: str | None = None,
    max_new_tokens: int = 32,
    force_base: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    **route: Any,
) -> WhichResult:
    """Answer prompts by each expert alone, by the base and by the router.

    Args:
        library: the library, or its path.
        prompts: one or several; a `lorary.evaluate.prompts.Prompt` may bring the right answer.
        base: the base model, or a reference of it; the library's own where None.
        template: `plain` or `chat`; the experts' own where None.
        max_new_tokens: most tokens of an answer.
        force_base: accept unrelated weights of the same shapes.
        device: where a base is loaded that is not in memory.
        dtype: its precision.
        route: router, experts, preset and fields of a routing setting, as `lorary.attach` takes them.

    Returns:
        The answers, with the router's weights, the losses of right answers, and a verdict for each prompt.

    Raises:
        UsageError: if there is no prompt, one is empty or too long, or an option is out of range.
        LoraryError: as for `lorary.attach`.
    """
    several = [prompts] if isinstance(prompts, (str, Prompt)) else prompts
    asked = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in several]
    if isinstance(base, Base):
        opened = library if isinstance(library, Library) else Library.open(library)
        return which_library(
            base, opened, asked, template=template, max_new_tokens=max_new_tokens, force_base=force_base, **route
        )
    load = BaseOptions(None if base is None else str(base), force_base, device, dtype)
    path = library.path if isinstance(library, Library) else library
    return run_which(str(path), asked, template=template, max_new_tokens=max_new_tokens, load=load, **route)


def run_which(
    library_path: str,
    prompts: Sequence[Prompt],
    *,
    template: str | None = None,
    max_new_tokens: int = 32,
    load: BaseOptions | None = None,
    **route: Any,
) -> WhichResult:
    """Load a library and its base, and answer prompts by each expert alone, the base and the router.

    Args:
        library_path: folder of the library.
        prompts: at least one.
        template: `plain` or `chat`; the experts' own where None.
        max_new_tokens: most tokens of an answer.
        load: the base model; the library's own where None.
        route: router, experts, preset and fields of a routing setting, as `lorary.attach` takes them.

    Returns:
        The answers.

    Raises:
        UsageError: if there is no prompt, one is empty or too long, or an option is out of range.
        LoraryError: as for `lorary.attach`.
    """
    load = load or BaseOptions()
    check_prompts(prompts, max_new_tokens)
    if route.get("experts") is not None and not route["experts"]:
        raise UsageError("--experts must name an expert", found="none", remedy="--router base uses no expert")
    started = time.perf_counter()
    library = Library.open(library_path)
    loaded = load_base(base_of(library, load.base), dtype=load.dtype, device=load.device)
    load_seconds = time.perf_counter() - started
    result = which_library(
        loaded, library, prompts, template=template, max_new_tokens=max_new_tokens, force_base=load.force_base, **route
    )
    return replace(result, load_seconds=load_seconds)
