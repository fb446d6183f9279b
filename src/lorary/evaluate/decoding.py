"""How the answer to a row is generated: what the task's metric needs, and what the row itself asks for."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from lorary.data.schema import Row, shorten
from lorary.errors import TaskError

FIELD = "generation"
# Below it, logits divided by the temperature could leave what a float holds.
LOWEST = 1e-3
# Above it every token is drawn alike.
HIGHEST = 1e6
# Tokens of an answer, and answers of a row; more would never end.
MOST_TOKENS, MOST_SAMPLES = 1_000_000, 10_000


@dataclass(frozen=True)
class Decoding:
    """How an answer is generated.

    Args:
        max_new_tokens: most tokens of it.
        stop: texts before which it is cut; line breaks that it begins with are none.
        samples: how many answers.
        temperature: divides the logits before sampling; 0 takes the likeliest token.
        top_p: sample among the likeliest tokens that hold so much of the probability.
    """

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0


def decoding_of(row: Row, default: Decoding) -> Decoding:
    """What a row asks for in `extra["generation"]`, over what its metric needs.

    Raises:
        TaskError: naming the field, if it does not exist or its value is out of range.
    """
    generation = row.extra.get(FIELD, {})
    if not isinstance(generation, Mapping):
        raise TaskError(f"'{FIELD}' in extra of task '{row.task}' must be an object", found=shorten(generation))
    names = [field.name for field in fields(Decoding)]
    for name, value in generation.items():
        if name not in names or not _CHECKS[name](value):
            raise TaskError(
                f"'{FIELD}' in extra of task '{row.task}' may give max_new_tokens (1 to {MOST_TOKENS:,}), "
                f"samples (1 to {MOST_SAMPLES:,}), "
                f"stop (a list of texts), temperature (0, or {LOWEST} to {HIGHEST:g}) and top_p (above 0, at most 1)",
                found=f"{name}: {shorten(value)}",
            )
    return replace(default, **{name: _KINDS[name](value) for name, value in generation.items()})


def sample_seeds(row: Row, num_samples: int) -> list[int]:
    """A seed for each sampled answer of a row, by its content and the sample's number alone."""
    content = row.canonical_json().encode()
    digests = (hashlib.sha256(content + number.to_bytes(4, "big")).digest() for number in range(num_samples))
    return [int.from_bytes(digest[:8], "big") >> 1 for digest in digests]


def cut_at(text: str, stop: tuple[str, ...]) -> str:
    r"""The text before the first of the stops; line breaks that it begins with are none.

    >>> cut_at("\n  return 1\n\nprint(2)", ("\n\n",))
    '\n  return 1'
    """
    begin = len(text) - len(text.lstrip("\n"))
    places = [place for mark in stop if (place := text.find(mark, begin)) >= 0]
    return text[: min(places)] if places else text


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "max_new_tokens": lambda value: _is_count(value, MOST_TOKENS),
    "samples": lambda value: _is_count(value, MOST_SAMPLES),
    "stop": lambda value: isinstance(value, list) and all(isinstance(text, str) and text for text in value),
    "temperature": lambda value: _is_number(value) and (value == 0 or LOWEST <= value <= HIGHEST),
    "top_p": lambda value: _is_number(value) and 0 < value <= 1,
}
_KINDS: Mapping[str, Callable[[Any], Any]] = {
    "max_new_tokens": int,
    "samples": int,
    "stop": tuple,
    "temperature": float,
    "top_p": float,
}
