"""Weights of the base model that PEFT saves beside the factors of an adapter.

Where the embedding or the head is adapted, or the vocabulary was resized, PEFT saves these layers whole. Loading the
adapter in PEFT puts them in the place of the base's own. A copy of what the base has changes nothing; any other is
more than a LoRA.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from lorary.adapter import Adapter
from lorary.errors import AdapterError
from lorary.formats.peft_files import PREFIX

_COPY = re.compile(rf"{re.escape(PREFIX)}(?P<layer>.+?)(\.base_layer)?\.(?P<kind>weight|bias)", re.DOTALL)


def copied_name(key: str) -> str | None:
    """The name of the base's weight that a tensor of an adapter may be a copy of, None for what can be no copy."""
    match = _COPY.fullmatch(key)
    return f"{match['layer']}.{match['kind']}" if match and "lora" not in key.lower() else None


def copies_of(adapter: Adapter) -> dict[str, Tensor]:
    """The weights of the base that an adapter brings, by the base's names.

    Args:
        adapter: as `parse_adapter` gives it.
    """
    named = ((copied_name(key), tensor) for key, tensor in adapter.tensors.items())
    return {name: tensor for name, tensor in named if name is not None}


def check_copies(
    adapter: Adapter, copies: Mapping[str, Tensor], weights: Mapping[str, Tensor], base: str, *, is_cast: bool = False
) -> None:
    """Check that what an adapter brings of the base is what the base has.

    Args:
        adapter: for its name.
        copies: as `copies_of` gives them.
        weights: the base's own, by name; a name that is absent stands for a weight that the base lacks.
        base: what to call the base.
        is_cast: whether the weights may be a narrower dtype's than the base's file, and are compared as such.

    Raises:
        AdapterError: naming the weight, and whether its vocabulary or its values are others.
    """
    for name, copy in copies.items():
        weight = weights.get(name)
        if weight is None:
            raise AdapterError(
                f"adapter '{adapter.name}' must hold nothing but pairs of factors, and copies of the base's weights",
                found=f"{name[:200]} {tuple(copy.shape)}, which the base '{base}' lacks",
                remedy="retrain without embeddings and modules_to_save",
            )
        check_copied_shape(adapter.name, name, tuple(copy.shape), tuple(weight.shape), base)
        dtype = weight.dtype if is_cast and weight.dtype.itemsize < copy.dtype.itemsize else copy.dtype
        if not torch.equal(weight.to("cpu", dtype), copy.to(dtype)):
            raise other_values(adapter.name, name, base)


def check_copied_shape(adapter: str, name: str, shape: tuple[int, ...], own_shape: tuple[int, ...], base: str) -> None:
    """Check the shape of a copy, or that of factors for the head: other rows mean another vocabulary.

    Args:
        adapter: name of the adapter.
        name: of the weight, or the path of its layer.
        shape: of what the adapter has.
        own_shape: of what the base has.
        base: what to call the base.

    Raises:
        AdapterError: if they differ.
    """
    if shape == own_shape:
        return
    if shape[1:] == own_shape[1:] and len(shape) in (1, 2):
        raise AdapterError(
            f"adapter '{adapter}' must be for the vocabulary of the base model '{base}', {own_shape[0]} tokens",
            found=f"{shape[0]} tokens at {name}: the vocabulary was resized before the adapter was trained",
            remedy="make a library over the base with its vocabulary resized likewise, or retrain without new tokens",
        )
    raise AdapterError(
        f"adapter '{adapter}' must fit the base model '{base}' at {name}",
        found=f"the adapter has {shape}, the base {own_shape}",
        remedy="add it to a library of the base model that it was trained on",
    )


def other_values(adapter: str, name: str, base: str) -> AdapterError:
    """The error for a copy whose values are not the base's."""
    return AdapterError(
        f"adapter '{adapter}' must leave {name} of the base model '{base}' as it is, and it brings other values for it",
        found=f"{name} was trained, or comes from another base model",
        remedy="save it with save_embedding_layers=False if it was not trained; else put these weights into the base",
    )
