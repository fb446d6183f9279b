"""How many positions of a base model give every token one result, and a guard where more would not be noticed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorary.errors import BaseModelError

# What configurations call the number of positions, where transformers does not map the name.
_LENGTHS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length", "max_target_positions",
    "context_length",
)  # fmt: skip
# These drop the cache of keys and values where an answer crosses the original context, whatever their rotary positions.
_DROPS_CACHE = frozenset({"phi3", "phi4_multimodal", "phimoe"})


def configured_positions(model: Any) -> int | None:
    """The positions that the configuration allows, or None where it names no number.

    Rotary frequencies that follow the length of the text (`dynamic`, `longrope`) are one set up to their original
    context. Beyond it, a token's result depends on the other rows of its batch and on earlier passes.

    Args:
        model: a transformers model for causal language modelling.
    """
    config = text_config(model)
    named = (getattr(config, name, None) for name in _LENGTHS)
    total = next((value for value in named if isinstance(value, int) and value > 0), None)
    fixed = fixed_positions(model)
    return min((value for value in (total, fixed) if value is not None), default=None)


def fixed_positions(model: Any) -> int | None:
    """Up to which length rotary frequencies are one set; None where they do not follow the length."""
    config = text_config(model)
    total = getattr(config, "max_position_embeddings", None)
    original = getattr(config, "original_max_position_embeddings", None)
    limits: list[Any] = []
    if getattr(config, "model_type", None) in _DROPS_CACHE and isinstance(total, int) and isinstance(original, int):
        limits += [original] if original < total else []
    for rope in _ropes(config):
        kind = str(rope.get("rope_type", rope.get("type", "")))
        if "dynamic" in kind:
            limits.append(total)
        elif kind == "longrope":
            limits.append(rope.get("original_max_position_embeddings", original))
    return min((value for value in limits if isinstance(value, int)), default=None)


def text_config(model: Any) -> Any:
    """The configuration of the language model, inside that of a multimodal one."""
    inner = getattr(model.config, "get_text_config", None)
    return model.config if inner is None else inner(decoder=True)


def _ropes(config: Any) -> Iterator[Mapping[str, Any]]:
    """Settings of rotary positions: one for all layers, or one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if isinstance(rope, Mapping):
        yield rope
        yield from (value for value in rope.values() if isinstance(value, Mapping))


class _Shift:
    """A forward pre-hook of a model that counts positions from another number than those it is given.

    RoBERTa and its kin begin behind the padding index where they count themselves, and generation gives them positions
    from 0 on: a text would have one set of positions in a loss and another in an answer.

    Args:
        shift: what to add.
    """

    def __init__(self, shift: int) -> None:
        self.shift = shift

    def __call__(self, _model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Add it to the positions that are given."""
        positions = kwargs.get("position_ids")
        return None if positions is None else (args, {**kwargs, "position_ids": positions + self.shift})


def shift_positions(model: nn.Module, shift: int) -> list[RemovableHandle]:
    """Let positions that a model is given count from 0, as everywhere in transformers.

    Args:
        model: changed in place.
        shift: what it adds to positions that it counts itself.

    Returns:
        The handle of the hook; none where there is nothing to add, or it is there already.
    """
    if not shift or any(isinstance(hook, _Shift) for hook in model._forward_pre_hooks.values()):
        return []
    return [model.register_forward_pre_hook(_Shift(shift), with_kwargs=True)]


@contextmanager
def shifting_positions(model: nn.Module, shift: int) -> Iterator[None]:
    """`shift_positions` inside a block."""
    handles = shift_positions(model, shift)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class PositionGuard:
    """A forward pre-hook of a rotary embedding: refuses positions at which its frequencies would change.

    Args:
        limit: how many positions there are.
        family: name of the model class.
    """

    def __init__(self, limit: int, family: str) -> None:
        self.limit, self.family = limit, family

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the positions of the pass that begins."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and not value.is_floating_point() and value.numel():
                longest = int(value.max()) + 1
                if longest > self.limit:
                    raise BaseModelError(
                        f"a text must fit the {self.limit} positions at which the rotary frequencies of {self.family} "
                        "are the same for every text",
                        found=f"position {longest}: a token's result would depend on other rows and on earlier passes",
                        remedy="shorten the text or the answer, or cut rows with --max-length",
                    )


def guard_positions(model: Any) -> list[RemovableHandle]:
    """Put a `PositionGuard` where frequencies follow the length of the text, and take back what earlier texts changed.

    Args:
        model: a transformers model, changed in place.

    Returns:
        Handles of the hooks; none where the frequencies never change, or guards are there already.
    """
    limit = fixed_positions(model) if isinstance(model, nn.Module) else None
    if limit is None:
        return []
    handles = []
    for module in model.modules():
        if not _follows_length(module):
            continue
        _reset(module)
        if not any(isinstance(hook, PositionGuard) for hook in module._forward_pre_hooks.values()):
            guard = PositionGuard(limit, type(model).__name__)
            handles.append(module.register_forward_pre_hook(guard, with_kwargs=True))
    return handles


def _follows_length(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    listed = kinds.values() if isinstance(kinds, Mapping) else [kinds]
    return any("dynamic" in str(kind) or kind == "longrope" for kind in listed)


@torch.no_grad()
def _reset(module: Any) -> None:
    """Frequencies as they were before any text."""
    for name, original in list(module._buffers.items()):
        prefix, mark, _ = name.rpartition("original_inv_freq")
        current = module._buffers.get(f"{prefix}inv_freq")
        if mark and original is not None and current is not None and not torch.equal(current, original.to(current)):
            module._buffers[f"{prefix}inv_freq"] = original.to(current).clone()
        if mark and hasattr(module, f"{prefix}max_seq_len_cached"):
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
