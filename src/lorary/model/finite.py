"""A pass whose layers give no numbers must not count: attention on some machines turns them into numbers again."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorary.errors import BaseModelError, LoraryError, TrainError
from lorary.lora.seat import CHILD, linear_shape

# A norm over some ten thousand numbers of this size still is one. Squares of larger ones leave float32: the norm behind
# such a layer divides by infinity, and the zeros it gives look like any numbers.
MOST_OUTPUT = 1e16


@contextmanager
def finite_layers(model: Any) -> Iterator[Callable[[], None]]:
    """Watch the outputs of all embeddings and linear layers, experts included, and refuse at the end what a norm or
    attention may have made of outputs that are NaN, infinite or vast.

    The head is left out: some models rule words out by minus infinity.

    Args:
        model: a transformers model for causal language modelling, routed or not.

    Yields:
        A function that refuses what there is so far.

    Raises:
        BaseModelError: when the block ends or fails, naming the layer that was the first to give none.
    """
    largest: dict[str, Tensor] = {}  # in the order in which layers run

    def look(path: str, layer: nn.Module, _args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not isinstance(output, Tensor) or not output.numel():
            return
        if path in largest and output.dim() == 3 and output.shape[1] == 1 and not isinstance(layer, nn.Embedding):
            return  # a token of an answer: its prompt was looked at, and its embedding and logits are
        # One number for all passes, left where it is: to look at it each time would make a GPU wait.
        low, high = output.detach().aminmax()
        size = torch.maximum(high, -low).to(torch.promote_types(output.dtype, torch.float32))
        largest[path] = torch.maximum(size, largest[path]) if path in largest else size

    head = model.get_output_embeddings()
    layers = {
        path: layer
        for path, layer in model.named_modules()
        if (linear_shape(layer) or isinstance(layer, nn.Embedding)) and layer is not head
    }
    handles = [layer.register_forward_hook(partial(look, path)) for path, layer in layers.items()]
    try:
        yield partial(_check, model, largest, None)
    except (LoraryError, RuntimeError, ValueError) as error:  # of what such outputs led to: where they began says more
        if not isinstance(error, TrainError):  # it names the expert
            _check(model, largest, error)
        raise
    finally:
        for handle in handles:
            handle.remove()
    _check(model, largest, None)


def _check(model: Any, largest: dict[str, Tensor], cause: Exception | None) -> None:
    if not largest or bool((torch.stack([size.double().cpu() for size in largest.values()]) <= MOST_OUTPUT).all()):
        return
    path = next(path for path, size in largest.items() if not bool(size <= MOST_OUTPUT))
    rule = "finite numbers" if not bool(largest[path].isfinite()) else f"numbers below {MOST_OUTPUT:g}"
    raise BaseModelError(
        f"layer '{path}' must give {rule}",
        found=cause_of(model),
        remedy="lorary library verify for the adapters, another copy of the base model, or another --dtype",
    ) from cause


def cause_of(model: Any) -> str:
    """Where numbers that are none come from, as far as weights tell.

    Args:
        model: a transformers model, routed or not.
    """
    return weight_at_fault(model) or (
        "NaN or infinity out of finite weights: what the layers compute leaves what their dtype can hold"
    )


def weight_at_fault(model: Any) -> str:
    """The first weight that no layer can compute with, in words; nothing where there is none.

    Args:
        model: a transformers model, routed or not.
    """
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        if not weight.is_floating_point() or weight.device.type == "meta" or not weight.numel():
            continue
        size = float(weight.detach().abs().max())  # NaN where one is
        # A buffer of the base may be a mask, of the least number that there is.
        is_mask = not isinstance(weight, nn.Parameter) and f".{CHILD}." not in name
        if not math.isfinite(size) or (size > MOST_OUTPUT and not is_mask):
            kind = f"{size:.2g}" if math.isfinite(size) else "NaN or infinity"
            return f"{kind} in the weights, in {name} of {model.name_or_path or 'the base model'}"
    return ""
