"""Control characters of strangers' texts: written out in the terminal and in pages."""

import io
import sys

import pytest

from lorary.report.markup import text
from lorary.terminal import PrintableStream, printable, unescaped, writable


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("plain\tand\nlines", "plain\tand\nlines"),
        ("\x1b[2J\x07", "\\x1b[2J\\x07"),
        ("a\rb\x08\x7f\x9b", "a\\rb\\x08\\x7f\\x9b"),
        ("a\u202eb\u2066", "a\\u202eb\\u2066"),
        ("naïve 日本 עברית\u200f", "naïve 日本 עברית\u200f"),
    ],
)
def test_what_moves_or_reorders_text_is_written_out(given, shown):
    assert printable(given) == shown
    assert text(given) == shown


def test_halves_of_characters_are_written_out_where_a_stream_would_refuse_them():
    assert writable("a\ud800\x1b") == "a\\ud800\\x1b"


def test_a_stream_writes_out_what_is_printed_and_nothing_else_of_it_changes():
    inner = io.StringIO()
    stream = PrintableStream(inner)
    print("a\x1b[1m", "b", file=stream)
    assert inner.getvalue() == "a\\x1b[1m b\n"
    assert not stream.isatty()
    assert unescaped(stream) is inner
    assert unescaped(sys.stdout) is sys.stdout
