"""Frozen linear layers of a base on a CPU, their weights reordered once for the matrix library that reads them.

A training step multiplies by every weight of the base twice: forward, and backward to the layer's input. Weights that
nobody changes can be laid out beforehand as oneDNN's kernels read them, once for each direction.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Most bytes that the reordered weights may take, two copies of each. A fixed number, which does not depend on the free
# memory: a training that goes on after an interruption must compute as it did before.
MOST_BYTES = 4 * 2**30
_COPIES = 2
_onednn = torch.backends.mkldnn


@contextmanager
def packed_weights(model: Any) -> Iterator[None]:
    """Let the linear layers of a frozen model multiply by reordered weights while the context lasts.

    Plain float32 layers on an x86 CPU take part, and only if all of them fit `MOST_BYTES`. The head does not: it sees
    few tokens. `torch.backends.mkldnn.enabled = False` leaves all layers as they are.

    Args:
        model: a causal language model of transformers.
    """
    layers = _layers(model)
    for layer in layers:
        layer.forward = partial(_forward, *reordered(layer.weight), layer.bias)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def packed_bytes(model: Any) -> int:
    """Bytes that the reordered weights of a model take beside its own."""
    return _COPIES * sum(layer.weight.nbytes for layer in _layers(model))


def _layers(model: Any) -> list[nn.Linear]:
    """Layers whose forward is that of nn.Linear alone; no layers where these are too large or oneDNN is missing."""
    if platform.machine() not in ("x86_64", "AMD64") or not (_onednn.is_available() and _onednn.enabled):
        return []
    head = model.get_output_embeddings()
    layers = [layer for layer in model.modules() if layer is not head and _is_plain(layer)]
    return layers if _COPIES * sum(layer.weight.nbytes for layer in layers) <= MOST_BYTES else []


def _is_plain(layer: nn.Module) -> bool:
    if type(layer) is not nn.Linear or "forward" in vars(layer):  # tools that move layers between devices set their own
        return False
    weight = layer.weight
    is_frozen = not any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
    return is_frozen and weight.is_cpu and weight.dtype == torch.float32


def reordered(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (d_out, d_in) as the products forward and backward read it."""
    with torch.no_grad():
        reorder = torch.ops.mkldnn._reorder_linear_weight
        return reorder(weight.detach()), reorder(weight.detach().mT.contiguous())


def _forward(forward: Tensor, backward: Tensor, bias: Tensor | None, input: Tensor) -> Tensor:  # as nn.Linear calls it
    result: Tensor = _Product.apply(input, forward, backward, bias)  # type: ignore[no-untyped-call]
    return result


class _Product(torch.autograd.Function):
    """`x weightᵀ + bias`, with a gradient for x alone: nothing has to be kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Tensor, backward: Tensor, bias: Tensor | None) -> Tensor:
        ctx.backward_weight = backward
        return multiply(x, forward, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return multiply(grad, ctx.backward_weight), None, None, None


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product with a reordered weight, for which nothing is kept."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result
