"""A model whose logits are no numbers must not get a score: the first option or word would win by default."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lorary.errors import BaseModelError
from lorary.model.finite import MOST_OUTPUT, cause_of, finite_layers, weight_at_fault


@contextmanager
def finite_logits(model: Any, *, at_once: bool = False) -> Iterator[None]:
    """Watch the output head, and refuse what was computed from logits that are NaN, plus infinity, or vast by a weight.

    Minus infinity stays: some models rule words out that way. The head sees the positions alone that count. Before the
    logits are judged the outputs of all linear layers are, which say where it began (`lorary.model.finite`).

    Args:
        model: a transformers model for causal language modelling.
        at_once: end the very pass whose logits are none, as generation must, whose next token would come out of them.

    Raises:
        BaseModelError: when the block ends, if there were any.
    """
    counts: list[Tensor] = []

    def look(_head: torch.nn.Module, _args: Any, logits: Tensor) -> None:
        if not logits.numel():
            return
        # Added up where they are: to look at each pass would make a GPU wait.
        low, high = logits.aminmax()
        is_vast = (high > MOST_OUTPUT) | ((low < -MOST_OUTPUT) & low.isfinite())
        bad = torch.stack([(logits.isnan() | logits.isposinf()).sum(), is_vast.long()])
        is_first = not counts
        counts[:] = [bad if is_first else counts[0] + bad]
        if at_once:
            if is_first:  # of the prompt: of what follows the logits are judged
                check_layers()
            _check(model, counts)

    handle = model.get_output_embeddings().register_forward_hook(look)
    try:
        with finite_layers(model) as check_layers:
            yield
            _check(model, counts)
    finally:
        handle.remove()


def _check(model: Any, counts: list[Tensor]) -> None:
    bad, vast = counts[0].tolist() if counts else (0, 0)
    if vast and not bad and (cause := weight_at_fault(model)):  # else the model itself rules words in or out so
        raise BaseModelError(
            f"a model must give logits below {MOST_OUTPUT:g} to be scored", found=cause,
            remedy="another copy of the base model, or lorary library verify for the adapters",
        )  # fmt: skip
    if bad:
        raise BaseModelError(
            "a model must give logits that are numbers to be scored",
            found=f"{bad} of them NaN or infinite; {cause_of(model)}",
            remedy="another --dtype where activations overflow, and lorary library verify for the adapters",
        )


def furthest(values: Tensor) -> float:
    """The value furthest from zero, or the first NaN."""
    flat = values.flatten()
    return float(flat[torch.nan_to_num(flat.abs(), nan=torch.inf).argmax()])
