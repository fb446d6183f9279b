"""Expressions of a configuration that are names or lists of names: looked up, however many they are."""

import re
from collections.abc import Iterable
from typing import NamedTuple

# A dot stands for any sign, one behind a backslash for itself.
_NAME = re.compile(r"(?:\w|\\?\.)+", re.ASCII)
_NAMES = re.compile(
    rf"{_NAME.pattern}(?:\|{_NAME.pattern})*|\((?:\?:)?{_NAME.pattern}(?:\|{_NAME.pattern})*\)", re.ASCII
)


class PlainName(NamedTuple):
    """A name or path as an expression.

    Args:
        text: that it matches.
        wild: positions at which it matches any sign but a line feed.
    """

    text: str
    wild: tuple[int, ...]


def is_plain(expression: str) -> bool:
    """Whether an expression is a name, or several with `|` between them."""
    return _NAMES.fullmatch(expression) is not None


def plain_names(expression: str) -> list[PlainName]:
    """The names of which an expression consists, one of which it matches; `is_plain` must hold."""
    inner = expression.removeprefix("(").removeprefix("?:").removesuffix(")")
    return [_plain_name(part) for part in inner.split("|")]


def _plain_name(part: str) -> PlainName:
    if "\\" not in part:
        return PlainName(part, tuple(at for at, sign in enumerate(part) if sign == ".") if "." in part else ())
    text: list[str] = []
    wild: list[int] = []
    at = 0
    while at < len(part):
        is_literal = part[at] == "\\"
        at += is_literal
        if part[at] == "." and not is_literal:
            wild.append(len(text))
        text.append(part[at])
        at += 1
    return PlainName("".join(text), tuple(wild))


class PlainNames:
    """Names to find paths by.

    Args:
        entries: names, each with a number.
    """

    def __init__(self, entries: Iterable[tuple[int, PlainName]]) -> None:
        # By length and positions of dots, of which real names have few, the numbers by text.
        self._numbers: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        for number, name in entries:
            by_text = self._numbers.setdefault(len(name.text), {}).setdefault(name.wild, {})
            by_text[name.text] = min(number, by_text.get(name.text, number))

    def first(self, path: str, *, whole: bool = False) -> int | None:
        """The smallest number of a name that a path is, or ends with after a dot.

        Args:
            path: dotted path of a layer, without line feeds.
            whole: whether the path must be the name.
        """
        starts = [0] if whole else [0, *(at + 1 for at, sign in enumerate(path) if sign == ".")]
        numbers: list[int] = []
        for start in starts:
            end = path[start:]
            for wild, by_text in self._numbers.get(len(end), {}).items():
                text = end
                if wild:
                    signs = list(end)
                    for at in wild:
                        signs[at] = "."
                    text = "".join(signs)
                if (number := by_text.get(text)) is not None:
                    numbers.append(number)
        return min(numbers, default=None)
