"""Token ids as texts while they come, one by one."""

from collections.abc import Sequence
from typing import Any

from lorary.data.text_of_ids import CONTEXT, text_of_ids

# Tokens that may wait for the rest of a character. One has four bytes; more are no text, and would never end.
_MOST_WAITING = 8
_BROKEN = "\N{REPLACEMENT CHARACTER}"


class Detokeniser:
    """The text of an answer, token by token. A character of several tokens comes with its last one.

    Args:
        tokenizer: a transformers tokenizer.
        before: ids of the prompt.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._before = list(before)
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """Take the next token; the text that is complete with it, special tokens left out."""
        self._waiting.append(token)
        text = text_of_ids(self._tokenizer, self._waiting, self._before, special=False)
        if text.endswith(_BROKEN) and len(self._waiting) < _MOST_WAITING:
            return ""
        self._settle()
        return text

    def flush(self) -> str:
        """The text of tokens that still wait, where no other comes."""
        text = text_of_ids(self._tokenizer, self._waiting, self._before, special=False) if self._waiting else ""
        self._settle()
        return text

    def _settle(self) -> None:
        # Special tokens alone have no text to tell a context by; more than these are never looked at.
        self._before = [*self._before, *self._waiting][-8 * CONTEXT :]
        self._waiting = []


class TokenTexts:
    """The text of single tokens, special ones written out, as log-probabilities are reported by; each made once.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._anchor = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        self._texts: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = text_of_ids(self._tokenizer, [token], self._anchor)
        return self._texts[token]
