"""The yardstick: prompts of many kinds and languages that ship with the package and belong to no task.

They show what an expert scores on text in general, for routers that compare a request with that, where the prompts of
the experts' own tasks are not at hand. `yardstick.toml` holds kinds and word lists; all of it was written for this
purpose. The prompts depend on the seed alone: no random numbers are drawn.
"""

import hashlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

_PLACE = re.compile(r"\[\[([a-z_]+)(\d?)\]\]")
# Prompts of each kind that experts are measured on. More of each kind change no decision, and more kinds do.
PER_KIND = 4
# How far the words of one prompt are from those of the next: prime to the length of each list.
_STRIDE = 7


@dataclass(frozen=True)
class YardstickPrompt:
    """One prompt of the yardstick.

    Args:
        kind: what it asks for, or its language where that is not English.
        language: two letters.
        text: the prompt.
    """

    kind: str
    language: str
    text: str


@cache
def yardstick(seed: int = 0, per_kind: int = 8) -> tuple[YardstickPrompt, ...]:
    """The prompts with their kinds, in the order of the kinds.

    Args:
        seed: which words the prompts are filled with, and at which prompt a kind begins.
        per_kind: prompts of each kind, at most; a kind has fewer where its prompts would repeat.

    Returns:
        No two of one text.
    """
    document = tomllib.loads((files("lorary.data") / "yardstick.toml").read_text(encoding="utf-8"))
    prompts: dict[str, YardstickPrompt] = {}
    for kind in document["kinds"]:
        name, templates = kind["name"], kind["prompts"]
        texts: set[str] = set()
        for number in range(len(templates) * per_kind):
            text = _fill(
                templates[(_start(seed, name) + number) % len(templates)], document["words"], seed, name, number
            )
            if len(texts) == per_kind:
                break
            if text not in texts:
                texts.add(text)
                prompts.setdefault(text, YardstickPrompt(name, kind.get("language", "en"), text))
    return tuple(prompts.values())


def yardstick_prompts(seed: int = 0, per_kind: int = 8) -> list[str]:
    """The texts of `yardstick`."""
    return [prompt.text for prompt in yardstick(seed, per_kind)]


def measured_prompts() -> list[str]:
    """The texts that experts are measured on."""
    return yardstick_prompts(per_kind=PER_KIND)


@cache
def yardstick_digest() -> str:
    """A hash of `measured_prompts`, by which what was measured on them can be known again."""
    return hashlib.sha256("\0".join(measured_prompts()).encode()).hexdigest()[:16]


def _fill(template: str, words: Mapping[str, Sequence[str]], seed: int, kind: str, number: int) -> str:
    """A template with a word for each of its places: other ones in each prompt of the kind, while there are others."""
    places: dict[str, list[str]] = {}
    for name, digit in dict.fromkeys(_PLACE.findall(template)):
        places.setdefault(name, []).append(digit)

    def word(match: re.Match[str]) -> str:
        name, digit = match.groups()
        position = _start(seed, kind, name) + number * _STRIDE + places[name].index(digit)
        return words[name][position % len(words[name])]

    return _PLACE.sub(word, template)


def _start(*key: object) -> int:
    """Where a list is entered, as large a number as any."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, key)).encode()).digest()[:4], "big")
