"""`lorary generate`: one prompt, answered by the routed library."""

from collections.abc import Sequence
from typing import Any

import torch

from lorary.errors import UsageError
from lorary.evaluate.completion import Answer, answer, check_text
from lorary.library.opening import base_of, template_of
from lorary.library.store import Library
from lorary.model.attach import attach
from lorary.model.base import load_base
from lorary.numbers import check_count, check_seed


def run_generate(
    library_path: str,
    prompt: str,
    *,
    router: str | None = None,
    experts: Sequence[str] | None = None,
    top_k: int | None = None,
    temperature: float | None = None,
    mix: Any = None,
    template: str | None = None,
    max_new_tokens: int = 64,
    sample: bool = False,
    seed: int = 0,
    stream: bool = False,
    base: str | None = None,
    force_base: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    **settings: Any,
) -> Answer:
    """Load a library and its base, and answer one prompt.

    Args:
        library_path: folder of the library.
        prompt: text to answer; the template puts it into the form the experts know.
        router: name of a router; the library's default where None.
        experts: named experts in place of a router.
        top_k: experts per token and layer.
        temperature: divides the router's scores.
        mix: `outputs` or `factors`.
        template: `plain` or `chat`; the experts' own where None.
        max_new_tokens: most tokens of the answer.
        sample: sample from the distribution (temperature 1) in place of taking the likeliest token.
        seed: of sampling.
        stream: print the answer on stdout while it is made.
        base: the base model to load; the library's own where None.
        force_base: accept unrelated weights of the same shapes.
        device: where to run.
        dtype: of the base.
        settings: a `preset` and further fields of `Routing`, as `lorary.attach` takes them.

    Returns:
        The answer.

    Raises:
        UsageError: if the prompt is empty, no text or too long, or an option is out of range.
        LoraryError: as for `lorary.attach`.
    """
    _check_options(prompt, experts, max_new_tokens, seed)
    library = Library.open(library_path)
    name = template_of(library, template)
    loaded = load_base(base_of(library, base), dtype=dtype, device=device)
    attach(
        loaded.model, library, router=router, top_k=top_k, temperature=temperature, mix=mix, experts=experts,
        tokenizer=loaded.tokenizer, force_base=force_base, **settings,
    )  # fmt: skip
    torch.manual_seed(seed)
    return answer(loaded, prompt, name, max_new_tokens=max_new_tokens, sample=sample, stream=stream)


def _check_options(prompt: str, experts: Sequence[str] | None, max_new_tokens: int, seed: int) -> None:
    check_text(prompt, "--prompt")
    if experts is not None and not experts:
        raise UsageError("--experts must name an expert", found="none", remedy="--router base uses no expert")
    check_count("--max-new-tokens", max_new_tokens)
    check_seed("--seed", seed)
