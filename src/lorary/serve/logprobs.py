"""Log-probabilities in the two shapes of the OpenAI interface."""

import math
from collections.abc import Sequence
from typing import Any

from lorary.serve.engine import Token
from lorary.serve.text import TokenTexts

# JSON has no infinity; so unlikely a token never comes.
_LEAST = -9999.0


def completion_logprobs(tokens: Sequence[tuple[Token, int]], texts: TokenTexts) -> dict[str, list[Any]]:
    """The shape of `/v1/completions`: parallel lists.

    Args:
        tokens: each with the place where its text begins.
        texts: of single tokens.
    """
    return {
        "tokens": [texts[token.id] for token, _ in tokens],
        "token_logprobs": [None if token.logprob is None else _shown(token.logprob) for token, _ in tokens],
        "top_logprobs": [_by_text(token, texts) for token, _ in tokens],
        "text_offset": [start for _, start in tokens],
    }


def chat_logprobs(tokens: Sequence[tuple[Token, int]], texts: TokenTexts) -> dict[str, Any]:
    """The shape of `/v1/chat/completions`: one object per token; arguments as for `completion_logprobs`."""
    content = [
        {
            **_chat_token(token.id, token.logprob, texts),
            "top_logprobs": [_chat_token(other, logprob, texts) for other, logprob in token.top],
        }
        for token, _ in tokens
    ]
    return {"content": content, "refusal": None}


def _by_text(token: Token, texts: TokenTexts) -> dict[str, float] | None:
    """The likeliest tokens and the one that stands there; of two with one text, the likelier."""
    if token.logprob is None:
        return None
    by_text: dict[str, float] = {}
    for other, logprob in [*token.top, (token.id, token.logprob)]:
        by_text[texts[other]] = max(by_text.get(texts[other], -math.inf), _shown(logprob))
    return by_text


def _chat_token(token: int, logprob: float | None, texts: TokenTexts) -> dict[str, Any]:
    text = texts[token]
    is_part = "\N{REPLACEMENT CHARACTER}" in text  # of a character: its bytes are not known
    return {
        "token": text,
        "logprob": _shown(_LEAST if logprob is None else logprob),
        "bytes": None if is_part else list(text.encode()),
    }


def _shown(logprob: float) -> float:
    return max(logprob, _LEAST)
