"""A model whose logits are no numbers must not get a score: the first option or word would win by default."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lorary.errors import BaseModelError


@contextmanager
def finite_logits(model: Any) -> Iterator[None]:
    """Watch the output head, and refuse at the end what was computed from logits that are NaN or plus infinity.

    Minus infinity stays: some models rule words out that way. The head sees the positions alone that count.

    Args:
        model: a transformers model for causal language modelling.

    Raises:
        BaseModelError: when the block ends, if there were any.
    """
    found: list[Tensor] = []

    def look(_head: torch.nn.Module, _args: Any, logits: Tensor) -> None:
        # Added up where they are: to look at each pass would make a GPU wait.
        bad = (logits.isnan() | logits.isposinf()).sum()
        found[:] = [found[0] + bad if found else bad]

    handle = model.get_output_embeddings().register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()
    count = int(found[0]) if found else 0
    if count:
        raise BaseModelError(
            "a model must give logits that are numbers to be scored",
            found=f"{count} of them NaN or infinite",
            remedy="another --dtype where activations overflow, and lorary library verify for the adapters",
        )
