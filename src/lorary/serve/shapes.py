"""Answers in the shapes of the two endpoints, whole and in pieces."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from lorary.serve.choice import Delta
from lorary.serve.engine import Token
from lorary.serve.logprobs import chat_logprobs, completion_logprobs
from lorary.serve.text import TokenTexts

Placed = Sequence[tuple[Token, int]]


@runtime_checkable
class Shape(Protocol):
    """How an endpoint writes answers.

    Attributes:
        endpoint: its name.
        prefix: with which ids of its answers begin.
        whole: what a whole answer is called.
        piece: what a piece of a streamed one is called.
    """

    endpoint: str
    prefix: str
    whole: str
    piece: str

    def whole_choice(self, index: int, text: str, tokens: Placed | None, finish: str | None) -> dict[str, Any]:
        """A whole answer; its log-probabilities where `tokens` are given."""
        ...

    def opening(self, index: int) -> dict[str, Any] | None:
        """The piece before the first one; None where there is none."""
        ...

    def piece_choice(self, delta: Delta, *, has_logprobs: bool) -> dict[str, Any]:
        """A piece."""
        ...


class CompletionShape:
    """Answers of `/v1/completions`.

    Args:
        texts: of single tokens.
    """

    endpoint, prefix, whole, piece = "completions", "cmpl", "text_completion", "text_completion"

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    def whole_choice(self, index: int, text: str, tokens: Placed | None, finish: str | None) -> dict[str, Any]:
        """See `Shape`."""
        logprobs = None if tokens is None else completion_logprobs(tokens, self._texts)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def opening(self, index: int) -> dict[str, Any] | None:
        """See `Shape`."""
        return None

    def piece_choice(self, delta: Delta, *, has_logprobs: bool) -> dict[str, Any]:
        """See `Shape`."""
        return self.whole_choice(delta.index, delta.text, delta.tokens if has_logprobs else None, delta.finish)


class ChatShape:
    """Answers of `/v1/chat/completions`; argument as for `CompletionShape`."""

    endpoint, prefix, whole, piece = "chat", "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    def whole_choice(self, index: int, text: str, tokens: Placed | None, finish: str | None) -> dict[str, Any]:
        """See `Shape`."""
        logprobs = None if tokens is None else chat_logprobs(tokens, self._texts)
        message = {"role": "assistant", "content": text}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}

    def opening(self, index: int) -> dict[str, Any] | None:
        """See `Shape`."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece_choice(self, delta: Delta, *, has_logprobs: bool) -> dict[str, Any]:
        """See `Shape`."""
        logprobs = chat_logprobs(delta.tokens, self._texts) if has_logprobs else None
        text = {"content": delta.text} if delta.text else {}
        return {"index": delta.index, "delta": text, "logprobs": logprobs, "finish_reason": delta.finish}
