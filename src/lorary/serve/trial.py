"""Whether a base model can be served: tried on a few tokens, since no configuration tells."""

from typing import Any

import torch
from torch import Tensor

from lorary.errors import BaseModelError
from lorary.model.positions import text_config
from lorary.model.verdict import context_of
from lorary.serve.row_cache import RowCache
from lorary.serve.row_pass import row_pass

# Part of the largest logit that rounding may change.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF = 0.1


@torch.no_grad()
def check_serves(model: Any) -> None:
    """Refuse a model whose rows are not what they are alone, once they share a batch that changes.

    Two short prompts are read, one of them in pieces; both get two tokens together, and then one of them a third alone.
    The same texts are computed from the start.

    Args:
        model: a transformers model for causal language modelling, which computes bare.

    Raises:
        BaseModelError: if the results differ, or the model cannot take a cache of keys and values.
    """
    try:
        ours, plain = _both(model)
    except Exception as error:  # whatever a model raises at a cache that it does not know
        raise _refused(model, f"{type(error).__name__}: {error}") from error
    if not all(torch.isfinite(logits).all() for logits in plain):
        return  # such a base is refused where it answers, with the cause
    scale = max(float(logits.abs().max()) for logits in plain)
    difference = max(float((a - b).abs().max()) for a, b in zip(ours, plain, strict=True))
    if not difference <= _TOLERANCES.get(model.dtype, _HALF) * scale:
        raise _refused(model, f"logits that differ by {difference:.2g} of {scale:.2g}")


def _refused(model: Any, found: str) -> BaseModelError:
    return BaseModelError(
        f"{type(model).__name__} must keep keys and values of each token, and no other state, to answer many at once",
        found=found,
        remedy="serve another base; lorary generate answers one at a time",
    )


def _both(model: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of tokens by rows that come and go, and of the same tokens by texts from the start."""
    num_tokens, context = model.get_input_embeddings().num_embeddings, context_of(model) or 64
    long, short = max(min(10, context - 3), 2), max(min(5, context - 3), 1)
    texts = [[(3 + 7 * place + row) % num_tokens for place in range(n)] for row, n in enumerate((long + 3, short + 3))]
    num_layers = int(text_config(model).num_hidden_layers)
    cache = RowCache(num_layers)
    ours: list[Tensor] = []
    for text, (first, length) in zip(texts, ((long // 2, long), (short, short)), strict=True):
        reading = RowCache(num_layers)
        reading.begin([length])
        for start, stop in ((0, first), (first, length)):
            if start < stop:
                logits = row_pass(model, reading, torch.tensor([text[start:stop]]))[0, -1]
        ours.append(logits)
        cache.add(reading.row(0), length)
    for step in range(2):
        new = torch.tensor([[texts[0][long + step]], [texts[1][short + step]]])
        ours.extend(row_pass(model, cache, new)[:, -1])
    cache.drop(0)
    ours.append(row_pass(model, cache, torch.tensor([[texts[1][short + 2]]]))[0, -1])
    places = ((0, long), (1, short), (0, long + 1), (1, short + 1), (0, long + 2), (1, short + 2), (1, short + 3))
    plain = [
        model(input_ids=torch.tensor([texts[row][:length]], device=model.device), use_cache=False).logits[0, -1]
        for row, length in places
    ]
    return ours, plain
