"""Logits at chosen positions only, from padded or packed rows: the head is a fifth of a small model's arithmetic."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lorary.data.batching import Batch
from lorary.data.packing import PACKED_LENGTH, Group, micro_batches
from lorary.data.template import Example
from lorary.lora.seat import input_of
from lorary.model.row_attention import NAMES, attending_rows

# Fields in which models say how far back their attention reaches, which attention to rows does not know.
_REACH = ("sliding_window", "window_size", "attention_window", "attention_chunk_size")
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


def target_logits(model: Any, batch: Batch) -> Float[Tensor, "targets vocabulary"]:
    """Run a causal language model and compute logits only where a target token is predicted.

    A hook hands the output head the chosen positions alone, so that whatever a model does after its head (soft caps,
    scales) still applies.

    Args:
        model: a transformers model for causal language modelling.
        batch: sequences padded on the right, on the model's device; packed ones only where `can_pack` holds.

    Returns:
        One row of logits per target token, in the model's dtype.
    """

    def keep_targets(head: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = input_of(head, args, kwargs)
        target_states = hidden[batch.rows, batch.positions].unsqueeze(0)
        return (target_states, *args[1:])[: len(args)], {
            name: target_states if value is hidden else value for name, value in kwargs.items()
        }

    handle = model.get_output_embeddings().register_forward_pre_hook(keep_targets, with_kwargs=True)
    try:
        with attending_rows(model, batch) as places:
            positions = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
            logits: Tensor = model(input_ids=batch.input_ids, use_cache=False, **positions, **places).logits
    finally:
        handle.remove()
    return logits[0]


def target_losses(model: Any, batch: Batch) -> Float[Tensor, " targets"]:
    """Negative log-likelihood of each target token, in nats, float32 (float64 for such a model).

    Args:
        model: a transformers model for causal language modelling.
        batch: as `target_logits` takes it.

    Returns:
        One loss per target token, in the order of `batch.labels`.
    """
    return label_losses(target_logits(model, batch), batch.labels)


def label_losses(logits: Float[Tensor, "targets vocabulary"], labels: Int[Tensor, " targets"]) -> Tensor:
    """(targets,) negative log-likelihood of each label, in nats, float32 (float64 for such logits)."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.nn.functional.cross_entropy(logits.to(dtype), labels, reduction="none")


def can_pack(model: Any) -> bool:
    """Whether `packed_length` reaches `PACKED_LENGTH`, which the layout of a training step asks for."""
    return packed_length(model, PACKED_LENGTH) == PACKED_LENGTH


def packed_length(model: Any, longest: int) -> int:
    """Up to how many tokens a row may have to share a sequence with others and keep its exact result.

    Recurrent layers, attention that transformers cannot exchange and models without position ids do not. What the
    configuration does not tell is found out by running two short rows packed, padded, and packed as if they were one
    row: packing is exact where the first two agree to rounding, which is judged against the third.

    Args:
        model: a causal language model of transformers, in evaluation mode; bare, or routed token by token.
        longest: how far it is asked for, at least 1.

    Returns:
        `longest`, or what the model's attention reaches where that is less; 0 where packing is not exact.
    """
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation not in NAMES:
        return 0
    if not _ATTENTION_LAYERS.issuperset(getattr(config, "layer_types", None) or ()):
        return 0
    reaches = (getattr(config, field, None) for field in _REACH)
    reach = min([longest, *(reach for reach in reaches if isinstance(reach, int) and reach > 0)])
    return reach if _packs_exactly(model) else 0


def _packs_exactly(model: Any) -> bool:
    """Run two rows that share their first token padded, packed, and packed as if they were one row."""
    last = model.get_input_embeddings().num_embeddings - 1
    # In sorted order, so that both layouts have their targets in one order.
    rows = [Example((1, 2, 3), (4, 5), 0), Example((1, last, last - 1), (6, 7), 0)]
    batches = []
    for share_prefix in (False, True):
        (micro,) = micro_batches([Group(0, 0, rows, range(2))], PACKED_LENGTH, share_prefix=share_prefix)
        batches.append(micro.batch.to(model.device))
    batches.append(batches[1]._replace(position_ids=None, places=None))
    try:
        with torch.no_grad():
            padded, packed, merged = (target_losses(model, batch) for batch in batches)
    except Exception:  # whatever a model raises at a layout it does not know, it cannot take it
        return False
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    return float((packed - padded).abs().max()) < tolerance * float((merged - padded).abs().max())
