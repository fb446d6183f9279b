"""Choosing and ordering the lines of a listing; nothing here brings torch, so that it comes at once."""

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from lorary.errors import UsageError, did_you_mean

Row = Mapping[str, Any]

NUMBERS = ("rank", "num_parameters", "bytes")
LISTS = ("tasks", "targets", "tags")
TEXTS = ("name", "changed", "origin", "note", "hash")
KEYS = (*TEXTS, *LISTS, *NUMBERS)
# One value of a list as people call it, and numbers by their heading.
_ALIASES = {"task": "tasks", "target": "targets", "tag": "tags", "parameters": "num_parameters", "size": "bytes",
            "date": "changed"}  # fmt: skip
_FILTER = re.compile(r"\s*([A-Za-z_]+)\s*(>=|<=|=)\s*(.*?)\s*", re.DOTALL)


def select(
    listed: Sequence[Row],
    *,
    filters: Sequence[str] = (),
    search: str | None = None,
    tags: Sequence[str] = (),
    sort: str | None = None,
    is_reversed: bool = False,
) -> list[Row]:
    """The lines of a listing that fit all that is asked for.

    Args:
        listed: as `lorary.library.listing.list_library` gives them.
        filters: `KEY=PATTERN`, `KEY>=VALUE` or `KEY<=VALUE` each; of a list, one value has to fit.
        search: a text that stands in the name, the tasks, tags, note, origin or targets, in upper or lower case.
        tags: tags that an adapter must have, all of them.
        sort: a key; lines without a value come last. The order of the names where None.
        is_reversed: the other way round.

    Raises:
        UsageError: if there is no such key, or a filter is none.
    """
    tests = [*map(_test_of, filters), *(_test_of(f"tags={tag}") for tag in tags)]
    needle = None if search is None else search.casefold()
    chosen = [
        row for row in listed if all(test(row) for test in tests) and (needle is None or needle in _searched(row))
    ]
    if sort is not None:
        key = _key(sort)
        empty = [row for row in chosen if row[key] in (None, "", [])]
        full = sorted((row for row in chosen if row[key] not in (None, "", [])), key=lambda row: row[key])
        return [*(reversed(full) if is_reversed else full), *empty]
    return chosen[::-1] if is_reversed else chosen


def _searched(row: Row) -> str:
    texts = [row["name"], *row["tasks"], *row["tags"], row["note"], row["origin"] or "", *(row["targets"] or ())]
    return "\n".join(texts).casefold()


def _test_of(text: str) -> Callable[[Row], bool]:
    match = _FILTER.fullmatch(text)
    if match is None or not match[3]:
        raise UsageError(
            "a filter must be KEY=PATTERN, KEY>=VALUE or KEY<=VALUE",
            found=ascii(text)[:200],
            remedy="for example --filter task=sst2 or --filter 'rank>=8'",
        )
    key, sign, value = _key(match[1]), match[2], match[3]
    if key in NUMBERS:
        number = _number(key, value)
        return {
            "=": lambda row: bool(row[key] == number),
            ">=": lambda row: bool(row[key] >= number),
            "<=": lambda row: bool(row[key] <= number),
        }[sign]
    if sign == "=":
        return lambda row: any(fnmatchcase(candidate, value) for candidate in _candidates(key, row))
    if key != "changed":
        raise UsageError(
            f"a filter by {key} must be {key}=PATTERN",
            found=ascii(text)[:200],
            remedy=f">= and <= compare {', '.join(NUMBERS)} and changed",
        )
    if sign == ">=":
        return lambda row: bool(row[key][: len(value)] >= value)
    return lambda row: bool(row[key][: len(value)] <= value)


def _candidates(key: str, row: Row) -> list[str]:
    """What a pattern may fit: a hash and a date also by their beginnings, a layer also by the name of its module."""
    values = [row[key]] if key in TEXTS else list(row[key] or ())
    if key == "targets":
        return [*values, *(value.rpartition(".")[2] for value in values)]
    if key == "hash":
        return [*values, row[key][:12]]
    if key == "changed":
        return [*values, row[key][:10]]
    return ["" if value is None else value for value in values]


def _key(name: str) -> str:
    key = _ALIASES.get(name, name)
    if key not in KEYS:
        remedy = did_you_mean(name, [*KEYS, *_ALIASES], remedy=f"they are {', '.join(KEYS)}")
        raise UsageError("a listing has no such key", found=ascii(name), remedy=remedy)
    return key


def _number(key: str, value: str) -> float:
    try:
        return float(value.replace(",", ""))
    except ValueError:
        raise UsageError(f"a filter by {key} must have a number", found=ascii(value)[:200]) from None
