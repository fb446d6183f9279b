"""Seating modules beside the linear layers of a model, and taking them away again.

A seated module becomes the child `lorary` of the linear layer, and a forward hook adds what it computes to the layer's
own output. The layer itself is never replaced: quantised layers work through their own forward, the parameter names of
the base stay as they are, and `detach` leaves nothing behind (docs/adr/0001).
"""

from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorary.errors import AdapterError

CHILD = "lorary"


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear layer of any kind, or None for a module that is not one.

    nn.Linear, its quantised kin (which keep `in_features`), and transformers' Conv1D (`nx`, `nf`) are linear layers.
    The output layer of nn.MultiheadAttention is none: attention reads its weight and never calls it, so that experts
    seated there would be silent.
    """
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    for d_in, d_out in (("in_features", "out_features"), ("nx", "nf")):
        if isinstance(getattr(module, d_in, None), int) and isinstance(getattr(module, d_out, None), int):
            return int(getattr(module, d_in)), int(getattr(module, d_out))
    return None


def device_of(layer: nn.Module, model: nn.Module) -> torch.device:
    """Where a layer computes.

    A layer that accelerate offloads holds its weights on the meta device while it does not run; its hook says where it
    does. Some quantised layers hold buffers only, or neither: they compute where the model begins.

    Args:
        layer: of the model.
        model: the base model.
    """
    hook = getattr(layer, "_hf_hook", None)
    for own in (hook, *getattr(hook, "hooks", ())):
        place = getattr(own, "execution_device", None)
        if place is not None:
            return torch.device(place)
    return next(chain(layer.parameters(), layer.buffers(), model.parameters())).device


def find_linear(model: nn.Module, path: str, adapter: str, d_in: int, d_out: int) -> nn.Module:
    """The linear layer at a path, checked to fit.

    Args:
        model: the base model.
        path: dotted path of the layer.
        adapter: name of the adapter that asks, for the error.
        d_in: input features of the adapter's factors.
        d_out: output features of the adapter's factors.

    Returns:
        The layer.

    Raises:
        AdapterError: if there is no such layer, it is not linear, or its shape differs.
    """
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise AdapterError(
            f"adapter '{adapter}' adapts layer '{path}', which the base model must have",
            found=f"no such layer in {type(model).__name__}",
            remedy="attach it to the model it was trained on",
        ) from None
    shape = linear_shape(module)
    if shape is None:
        raise AdapterError(f"adapter '{adapter}': layer '{path}' must be a linear layer", found=type(module).__name__)
    if shape != (d_in, d_out):
        raise AdapterError(
            f"adapter '{adapter}' must fit layer '{path}' (d_in, d_out) = {shape}",
            found=(d_in, d_out),
            remedy="attach it to the model it was trained on",
        )
    return module


def seat(model: nn.Module, children: Mapping[str, nn.Module]) -> list[RemovableHandle]:
    """Seat one module per linear layer.

    Args:
        model: the base model, changed in place.
        children: modules by the path of their layer; each is called with (x, output) and returns the new output.

    Returns:
        The handles of the hooks, for `unseat`.

    Raises:
        AdapterError: if a layer already has a module seated, or two paths lead to one layer; nothing is changed then.
    """
    layers: dict[int, str] = {}
    for path in children:
        layer = model.get_submodule(path)
        if hasattr(layer, CHILD):
            raise AdapterError(f"layer '{path}' must be free", found="experts are seated there", remedy="lorary.detach")
        if id(layer) in layers:
            raise AdapterError(
                f"layers '{path}' and '{layers[id(layer)]}' are one tied module and can be adapted only once",
                found="factors for both",
            )
        layers[id(layer)] = path
    handles = []
    for path, child in children.items():
        layer = model.get_submodule(path)
        layer.add_module(CHILD, child)
        handles.append(layer.register_forward_hook(_add_seated))
    return handles


def unseat(model: nn.Module, paths: list[str], handles: list[RemovableHandle]) -> None:
    """Take seated modules away; the model is as it was before `seat`."""
    for handle in handles:
        handle.remove()
    for path in paths:
        delattr(model.get_submodule(path), CHILD)


def _add_seated(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    result: Tensor = getattr(layer, CHILD)(args[0], output)
    return result
