"""Attention for sequences that many rows share: each row attends to itself, whatever stands around it.

Everything but attention computes token by token, and may do so once for the tokens that rows share. Attention is handed
the rows again: queries, keys and values are copied to where the tokens of each row stand one after another, the model's
own attention runs there, causal and without a mask, and each token takes its result from the first row that holds it.
Every row that holds a token would give it the same one.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lorary.data.batching import Batch
from lorary.data.places import Places

# By the implementation of attention that the model is set to.
NAMES = {"sdpa": "lorary_rows_sdpa", "eager": "lorary_rows_eager"}


@contextmanager
def attending_rows(model: Any, batch: Batch) -> Iterator[dict[str, Any]]:
    """Let the model attend row by row while the context lasts; a backward pass that computes anew belongs in it.

    Args:
        model: a causal language model of transformers for which `can_pack` holds.
        batch: what it is about to be fed; nothing changes where its rows have sequences of their own.

    Yields:
        What to call the model with besides.
    """
    if batch.places is None:
        yield {}
        return
    config = model.config.get_text_config(decoder=True)  # its own, where a language model is part of another
    before = config._attn_implementation
    config._attn_implementation = NAMES.get(before, before)  # a context may stand in another
    try:
        yield {"lorary_places": batch.places}
    finally:
        config._attn_implementation = before


def attend_rows(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    lorary_places: Places,
    implementation: str,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, over the rows of a batch.

    Args:
        module: the attention layer.
        query: (1, heads, seq, head_dim), rotated.
        key: (1, key heads, seq, head_dim), rotated.
        value: (1, key heads, seq, head_dim).
        attention_mask: None: rows are causal.
        lorary_places: where the tokens of each row lie.
        implementation: the attention that the model is set to.
        settings: what else that takes.

    Returns:
        (1, seq, heads, head_dim), and no weights.
    """
    assert attention_mask is None
    inner = _inner(module, implementation)
    spread = [spread_states(states[0].transpose(0, 1), lorary_places) for states in (query, key, value)]
    sizes = [rows * longest for rows, longest in lorary_places.shapes]
    attended = []
    for shape, *blocks in zip(lorary_places.shapes, *(states.split(sizes) for states in spread), strict=True):
        row_states = [block.unflatten(0, shape).transpose(1, 2) for block in blocks]  # (rows, heads, longest, head_dim)
        mask = _causal(row_states[0]) if implementation == "eager" else None
        attended.append(inner(module, *row_states, mask, **settings)[0].flatten(0, 1))
    return collect_states(torch.cat(attended), lorary_places)[None], None


for _implementation, _name in NAMES.items():
    AttentionInterface.register(_name, partial(attend_rows, implementation=_implementation))


def _inner(module: Any, implementation: str) -> Callable[..., Any]:
    """What the layer would call by itself; each file of transformers has an eager attention of its own."""
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    return attention


def _causal(query: Tensor) -> Tensor:
    """(1, 1, longest, longest), added to scores."""
    longest = query.shape[2]
    lowest = torch.full((longest, longest), torch.finfo(query.dtype).min, dtype=query.dtype, device=query.device)
    return lowest.triu(1)[None, None]


def spread_states(states: Float[Tensor, "tokens *features"], places: Places) -> Float[Tensor, "places *features"]:
    """Copy what belongs to tokens to all their places.

    Args:
        states: of each token.
        places: where they go. What flows back from padding is taken to be nothing, and is not looked at.
    """
    result: Tensor = _Spread.apply(states, places)  # type: ignore[no-untyped-call]
    return result


def collect_states(states: Float[Tensor, "places *features"], places: Places) -> Float[Tensor, "tokens *features"]:
    """What the first row that holds a token found for it.

    Args:
        states: of each place.
        places: where the tokens stand.
    """
    result: Tensor = _Collect.apply(states, places)  # type: ignore[no-untyped-call]
    return result


class _Spread(torch.autograd.Function):
    """See `spread_states`."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return states.index_select(0, places.tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _, tokens, owners, repeats = ctx.places
        grad_states = grad.index_select(0, owners)
        return grad_states.index_add_(0, tokens[repeats], grad.index_select(0, repeats)), None


class _Collect(torch.autograd.Function):
    """See `collect_states`."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return states.index_select(0, places.owners)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad_states = grad.new_zeros(len(ctx.places.tokens), *grad.shape[1:])
        return grad_states.index_copy_(0, ctx.places.owners, grad), None
