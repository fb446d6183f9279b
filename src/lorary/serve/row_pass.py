"""One pass of a model over the next tokens of rows that are cached."""

from inspect import signature
from typing import Any

from torch import Tensor

from lorary.serve.row_cache import RowCache


def row_pass(model: Any, cache: RowCache, ids: Tensor, *, every: bool = False) -> Tensor:
    """(rows, 1, vocabulary) logits behind the last token of each row, or behind every one.

    Args:
        model: a transformers model for causal language modelling.
        cache: of the rows; holds these tokens afterwards.
        ids: (rows, columns), the next tokens, on the CPU.
        every: whether logits are wanted behind all of them.
    """
    parameters, num_new = signature(model.forward).parameters, ids.shape[1]
    mask = cache.mask(num_new)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in parameters:
        given["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, -num_new:]
    given = {name: tensor.to(model.device) for name, tensor in given.items()}
    if not every and "logits_to_keep" in parameters:
        given["logits_to_keep"] = 1
    output = model(**given, past_key_values=cache.states, use_cache=True)
    cache.advance(num_new)
    logits: Tensor = output.logits
    return logits if every else logits[:, -1:]
