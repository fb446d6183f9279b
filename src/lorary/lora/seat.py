"""Seating modules beside the linear layers of a model, and taking them away again.

A seated module becomes the child `lorary` of the linear layer, and a forward hook adds what it computes to the layer's
own output. The layer itself is never replaced: quantised layers work through their own forward, the parameter names of
the base stay as they are, and `detach` leaves nothing behind (docs/adr/0001).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from inspect import signature
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorary.errors import AdapterError
from lorary.lora.flattened import ROWS, Rows

CHILD = "lorary"


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear layer of any kind, or None for a module that is not one.

    nn.Linear, its quantised kin (which keep `in_features`), and transformers' Conv1D (`nx`, `nf`) are linear layers.
    The output layer of nn.MultiheadAttention does not count: attention reads its weight and never calls it, so experts
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
    for device_hook in (hook, *getattr(hook, "hooks", ())):
        place = getattr(device_hook, "execution_device", None)
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
        rows = vars(layer).get(ROWS)
        hook = _add_seated if rows is None else partial(_add_by_rows, rows)
        handles.append(layer.register_forward_hook(hook, with_kwargs=True))
    return handles


def unseat(model: nn.Module, paths: list[str], handles: list[RemovableHandle]) -> None:
    """Take seated modules away; the model is as it was before `seat`."""
    for handle in handles:
        handle.remove()
    for path in paths:
        delattr(model.get_submodule(path), CHILD)


@contextmanager
def seated_instead(model: nn.Module, children: Mapping[str, nn.Module]) -> Iterator[None]:
    """Seat modules while the context lasts, in the place of those that are seated; other layers compute bare.

    Hooks stay where they are: those of others, which come behind ours, go on seeing what ours give.

    Args:
        model: the base model, with or without modules seated in it.
        children: as for `seat`.

    Raises:
        AdapterError: if two paths lead to one layer.
    """
    layers = {path: layer for path, layer in model.named_modules() if CHILD in layer._modules}
    before = {path: layer._modules[CHILD] for path, layer in layers.items()}
    free = {path: child for path, child in children.items() if path not in layers}
    handles = seat(model, free)
    try:
        for path, layer in layers.items():
            layer._modules[CHILD] = children.get(path, _Bare())
        yield
    finally:
        for path, layer in layers.items():
            layer._modules[CHILD] = before[path]
        unseat(model, list(free), handles)


class _Bare(nn.Module):
    """A module that leaves its layer as it is."""

    def forward(self, _x: Tensor, output: Tensor) -> Tensor:
        """What the layer computed."""
        return output


def input_of(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a linear layer was called with, by position or by keyword: `input` of nn.Linear, `x` of Conv1D.

    Args:
        layer: the layer.
        args: given by position.
        kwargs: given by keyword.

    Raises:
        AdapterError: if it is no tensor.
    """
    if args:
        hidden = args[0]
    else:
        name = next((name for name in ("input", "x") if name in kwargs), None)
        hidden = kwargs[name or next((n for n in signature(layer.forward).parameters if n in kwargs), "")]
    if not isinstance(hidden, Tensor):
        raise _no_tensor("be given", layer, hidden)
    return hidden


def _add_seated(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    child: Any = layer._modules[CHILD]  # twice as fast as the attribute, for each layer of each token
    x = input_of(layer, args, kwargs)
    if isinstance(output, Tensor):
        return child(x, output)
    # Some layers give their bias, or what they counted, beside what they computed.
    if not (isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor)):
        raise _no_tensor("compute", layer, output)
    parts = (child(x, output[0]), *output[1:])
    return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)


def _add_by_rows(rows: Rows, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    x = input_of(layer, args, kwargs)
    size = rows.of(x)
    if size is None or not isinstance(output, Tensor):
        return _add_seated(layer, args, kwargs, output)
    child: Any = layer._modules[CHILD]
    return child(x.unflatten(0, size), output.unflatten(0, size)).flatten(0, 1)


def _no_tensor(action: str, layer: nn.Module, value: object) -> AdapterError:
    return AdapterError(
        f"a routed layer ({type(layer).__name__}) must {action} a tensor",
        found=type(value).__name__,
        remedy="leave it out of the target modules",
    )
