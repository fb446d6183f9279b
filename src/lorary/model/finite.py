"""A pass whose layers give no numbers must not count: attention on some machines turns them into numbers again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorary.errors import BaseModelError, LoraryError
from lorary.lora.seat import linear_shape


@contextmanager
def finite_layers(model: Any) -> Iterator[Callable[[], None]]:
    """Watch the outputs of all linear layers, experts included, and refuse at the end what was computed from others.

    The head is left out: some models rule words out by minus infinity.

    Args:
        model: a transformers model for causal language modelling, routed or not.

    Yields:
        A function that refuses what there is so far.

    Raises:
        BaseModelError: when the block ends or fails, naming the layer that was the first to give none.
    """
    totals: dict[str, Tensor] = {}  # in the order in which layers run

    def look(path: str, _layer: nn.Module, _args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not isinstance(output, Tensor) or not output.numel():
            return
        # One number for all passes, left where it is: to look at it each time would make a GPU wait.
        if path in totals and output.dim() == 3 and output.shape[1] == 1:
            return  # a token of an answer: its prompt was looked at, and its logits are
        total = output.detach().sum(dtype=torch.promote_types(output.dtype, torch.float32))
        totals[path] = total + totals[path] if path in totals else total

    head = model.get_output_embeddings()
    layers = {path: layer for path, layer in model.named_modules() if linear_shape(layer) and layer is not head}
    handles = [layer.register_forward_hook(partial(look, path)) for path, layer in layers.items()]
    try:
        yield partial(_check, model, totals, None)
    except (RuntimeError, ValueError) as error:  # of sampling from what is no distribution, or of the logits
        if not isinstance(error, LoraryError):
            _check(model, totals, error)
        raise
    finally:
        for handle in handles:
            handle.remove()
    _check(model, totals, None)


def _check(model: Any, totals: dict[str, Tensor], cause: Exception | None) -> None:
    if not totals or bool(torch.stack([total.cpu() for total in totals.values()]).isfinite().all()):
        return
    path = next(path for path, total in totals.items() if not bool(total.isfinite()))
    raise BaseModelError(
        f"layer '{path}' must give finite numbers",
        found=cause_of(model),
        remedy="lorary library verify for the adapters, another copy of the base model, or another --dtype",
    ) from cause


def cause_of(model: Any) -> str:
    """Where numbers that are none come from, as far as weights tell.

    Args:
        model: a transformers model, routed or not.
    """
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        if weight.is_floating_point() and weight.device.type != "meta" and not bool(weight.isfinite().all()):
            return f"NaN or infinity in the weights, in {name} of {model.name_or_path or 'the base model'}"
    return "NaN or infinity out of finite weights: what the layers compute leaves what their dtype can hold"
