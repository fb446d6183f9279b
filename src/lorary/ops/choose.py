"""From scores to routing weights."""

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.errors import UsageError


def check_choice(top_k: int, temperature: float) -> None:
    """Refuse settings under which no expert could be chosen.

    Raises:
        UsageError: if `top_k` is below 1, or `temperature` is not a positive finite number.
    """
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise UsageError("top_k must be a whole number", found=repr(top_k))
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise UsageError("temperature must be a number", found=repr(temperature))
    if top_k < 1:
        raise UsageError("top_k must be at least 1", found=top_k, remedy="router 'base' uses no expert at all")
    if not 0 < temperature < float("inf"):
        raise UsageError("temperature must be a positive number", found=temperature)


def top_k_softmax(
    scores: Float[Tensor, "*tokens experts"], top_k: int, temperature: float
) -> Float[Tensor, "*tokens experts"]:
    """Softmax over the k highest scores of each token, zero elsewhere.

    Only finite scores take part: an expert scored minus infinity is never chosen, even where fewer than k remain, and
    a token for which none remains gets no expert. Which of several equal scores is taken is not defined.

    Args:
        scores: (..., experts), float32 or float64; minus infinity marks an expert that may not be chosen.
        top_k: experts per token, clamped to the number there is.
        temperature: divides the scores.

    Returns:
        Weights of the same shape and dtype; they sum to 1 over the experts, or to 0 where none may be chosen.
    """
    logits = scores / temperature
    num_experts = logits.shape[-1]
    if top_k < num_experts:
        best, chosen = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, chosen, best)
    weights = logits.softmax(dim=-1)
    # A row of minus infinities has a softmax of NaN; a NaN score itself must stay visible.
    return weights.masked_fill((logits == -torch.inf).all(dim=-1, keepdim=True), 0.0)
