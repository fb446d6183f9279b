"""Logits at chosen positions only: the output head is a fifth of a small model's arithmetic."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.data.batching import Batch


def target_logits(model: Any, batch: Batch) -> Float[Tensor, "targets vocabulary"]:
    """Run a causal language model and compute logits only where a target token is predicted.

    A hook hands the output head the chosen positions alone, so that whatever a model does after its head (soft caps,
    scales) still applies.

    Args:
        model: a transformers model for causal language modelling.
        batch: rows padded on the right, on the model's device.

    Returns:
        One row of logits per target token, in the model's dtype.
    """

    def keep_targets(_head: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][batch.rows, batch.positions].unsqueeze(0), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(keep_targets)
    try:
        logits: Tensor = model(input_ids=batch.input_ids, use_cache=False).logits
    finally:
        handle.remove()
    return logits[0]


def target_losses(model: Any, batch: Batch) -> Float[Tensor, " targets"]:
    """Negative log-likelihood of each target token, in nats, float32 (float64 for such a model).

    Args:
        model: a transformers model for causal language modelling.
        batch: rows padded on the right, on the model's device.

    Returns:
        One loss per target token, in the order of `batch.labels`.
    """
    logits = target_logits(model, batch)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.nn.functional.cross_entropy(logits.to(dtype), batch.labels, reduction="none")
