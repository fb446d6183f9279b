"""Text of strangers where people read it: characters that move the cursor, colour or reorder text are written out."""

import re
from typing import Any

# Control characters except line feed and tab, and overrides that reorder text.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""The text with its control characters written out.

    >>> printable("a\x1b[31mb")
    'a\\x1b[31mb'
    """
    if text.isascii() and text.isprintable():
        return text
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def writable(text: str) -> str:
    """The same for a stream: halves of characters, which none takes, are written out too."""
    return printable(text).encode("utf-8", "backslashreplace").decode("utf-8")


class PrintableStream:
    """A stream of text that people read, with control characters written out.

    Args:
        unescaped: the stream itself, for those who write control characters on purpose.
    """

    def __init__(self, unescaped: Any) -> None:
        self.unescaped = unescaped

    def write(self, text: str) -> int:
        """Write a text; the length is that of what was given."""
        self.unescaped.write(writable(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unescaped, name)


def unescaped(stream: Any) -> Any:
    """The stream under a `PrintableStream`, or the stream itself."""
    return getattr(stream, "unescaped", stream)
