"""From logits to the next token of each row, and to log-probabilities."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lorary.serve.answering import Request
from lorary.serve.engine import Finish, Token


def next_tokens(
    logits: Float[Tensor, "rows vocabulary"], requests: Sequence[Request], stops: frozenset[int]
) -> list[Token | None]:
    """The next token of each request; None where its logits are no numbers.

    Args:
        logits: one row for each request.
        requests: in that order; what they count is brought up to date.
        stops: ids that end an answer.
    """
    best, likeliest = logits.max(dim=1)
    is_sound = (best.isfinite()).tolist()  # NaN and plus infinity both show in the largest
    tokens: list[Token | None] = []
    for row, (request, token) in enumerate(zip(requests, likeliest.tolist(), strict=True)):
        if not is_sound[row]:
            tokens.append(None)
            continue
        if request.sampler is not None:
            token = int(request.sampler(likeliest, logits[row : row + 1]).argmax())
        logprob: float | None = None
        top: tuple[tuple[int, float], ...] = ()
        if request.job.num_top is not None:
            ((logprob, top),) = log_probabilities(logits[row : row + 1], torch.tensor([token]), request.job.num_top)
        request.num_new, request.last = request.num_new + 1, token
        finish: Finish | None = None
        if token in stops:
            finish = "stop"
        elif request.num_new >= request.job.max_new_tokens:
            finish = "length"
        tokens.append(Token(token, logprob, top, finish))
    return tokens


def log_probabilities(
    logits: Float[Tensor, "tokens vocabulary"], ids: Int[Tensor, " tokens"], num_top: int
) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """Of each token its log-probability, and the likeliest ones in its place with theirs, best first.

    Args:
        logits: that predict each token.
        ids: the tokens.
        num_top: how many likeliest ones.
    """
    logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=1)
    found = logprobs.gather(1, ids.to(logits.device)[:, None])[:, 0].tolist()
    values, places = logprobs.topk(min(num_top, logits.shape[1]), dim=1)
    tops = [tuple(zip(*both, strict=True)) for both in zip(places.tolist(), values.tolist(), strict=True)]
    return list(zip(found, tops, strict=True))
