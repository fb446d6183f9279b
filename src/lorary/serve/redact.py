"""Prompts as they may be written down: what a pattern matches is taken out."""

from collections.abc import Sequence

import regex

from lorary.errors import UsageError

# A pattern that takes longer on one prompt would hold up all requests.
MOST_SECONDS = 0.1
REDACTED = "[redacted]"
NOT_STORED = "[not stored: a pattern took too long]"


class Redactor:
    """Takes out of texts what patterns match.

    Args:
        patterns: regular expressions.

    Raises:
        UsageError: if one of them is none.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self._compiled = []
        for pattern in patterns:
            try:
                self._compiled.append(regex.compile(pattern))
            except regex.error as error:
                raise UsageError("--redact must be a regular expression", found=f"{pattern!r}: {error}") from None

    def __call__(self, text: str) -> str:
        """The text without what the patterns match; a notice in its place where one takes too long."""
        for compiled in self._compiled:
            try:
                text = compiled.sub(REDACTED, text, timeout=MOST_SECONDS)
            except TimeoutError:
                return NOT_STORED
        return text
