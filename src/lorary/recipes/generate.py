"""`lorary generate`: one prompt, answered by the routed library."""

from collections.abc import Sequence
from typing import Any

import torch

from lorary.errors import UsageError
from lorary.evaluate.completion import Answer, answer, check_text
from lorary.evaluate.sampling import Sampling
from lorary.library.opening import base_of, template_of
from lorary.library.store import Library
from lorary.model.attach import attach
from lorary.model.base import load_base
from lorary.numbers import check_count, check_seed
from lorary.recipes.base_options import BaseOptions


def run_generate(
    library_path: str,
    prompt: str,
    *,
    template: str | None = None,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    seed: int = 0,
    stream: bool = False,
    load: BaseOptions | None = None,
    **route: Any,
) -> Answer:
    """Load a library and its base, and answer one prompt.

    Args:
        library_path: folder of the library.
        prompt: text to answer; the template puts it into the form the experts know.
        template: `plain` or `chat`; the experts' own where None.
        max_new_tokens: most tokens of the answer.
        sampling: how tokens are drawn; the likeliest ones are taken where None.
        seed: of sampling.
        stream: print the answer on stdout while it is made.
        load: the base model; the library's own where None.
        route: router, experts, preset and fields of a routing setting, as `lorary.attach` takes them.

    Returns:
        The answer.

    Raises:
        UsageError: if the prompt is empty, no text or too long, or an option is out of range.
        LoraryError: as for `lorary.attach`.
    """
    load = load or BaseOptions()
    _check_options(prompt, route.get("experts"), max_new_tokens, seed)
    library = Library.open(library_path)
    name = template_of(library, template)
    loaded = load_base(base_of(library, load.base), dtype=load.dtype, device=load.device)
    attach(loaded.model, library, tokenizer=loaded.tokenizer, template=name, force_base=load.force_base, **route)
    torch.manual_seed(seed)
    return answer(loaded, prompt, name, max_new_tokens=max_new_tokens, sampling=sampling, stream=stream)


def _check_options(prompt: str, experts: Sequence[str] | None, max_new_tokens: int, seed: int) -> None:
    check_text(prompt, "--prompt")
    if experts is not None and not experts:
        raise UsageError("--experts must name an expert", found="none", remedy="--router base uses no expert")
    check_count("--max-new-tokens", max_new_tokens)
    check_seed("--seed", seed)
