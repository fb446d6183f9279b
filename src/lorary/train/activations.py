"""Activation checkpointing: a layer keeps its input alone and computes the rest again in the backward pass.

Done here by wrapping the layers' own forward, since transformers does it in training mode only, which would wake the
dropout of the base. No random state is kept: the base draws nothing in evaluation mode, and the dropout of adapters is
keyed, so that the second forward draws the same.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputed(model: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """Checkpoint the layers of a model while the context lasts.

    Args:
        model: the base model.
        paths: paths of the adapted linear layers; the layers are the members of the outermost lists that hold them.
    """
    layers = _layers(model, paths)
    before = [vars(layer).get("forward") for layer in layers]  # tools that move layers between devices set their own
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer, layer_forward in zip(layers, before, strict=True):
            if layer_forward is None:
                del layer.forward
            else:
                layer.forward = layer_forward


def _layers(model: nn.Module, paths: Iterable[str]) -> list[nn.Module]:
    lists: dict[int, nn.ModuleList] = {}
    for path in paths:
        module = model
        for part in path.split("."):
            module = getattr(module, part)
            if isinstance(module, nn.ModuleList):
                lists[id(module)] = module
                break
    return [layer for members in lists.values() for layer in members]
