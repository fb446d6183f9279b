"""Which layers an adapter_config.json selects, and with which rank and alpha: PEFT's rules, in bounded time.

PEFT matches the regular expressions of a configuration with `re`, which may take longer than anybody lives for a
pattern of twenty characters. Here they are matched by the package `regex`, which can stop; what it reads otherwise
than `re` does is refused.
"""

import math
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import regex

from lorary.errors import AdapterError
from lorary.formats.peft_plain import PlainNames, is_plain, plain_names

# Seconds of a core that one match, and all matches of an adapter, may take: a hundred times what real ones do.
MOST_SECONDS_ONCE, MOST_SECONDS = 0.25, 0.5
# What is compiled for one adapter, which takes half a second: lists of names are looked up, however long they are.
MOST_EXPRESSIONS, MOST_CHARACTERS = 500, 20_000
# What PEFT puts in the place of an empty layers_pattern.
ANY_NAME = r"[^.]*"
# Braces that are no repetition mean a fuzzy match to `regex`, and `[:` a class; to `re` they are plain characters.
_READ_OTHERWISE = re.compile(r"\{(?!\d*(,\d*)?\})|\[:")


class Selection:
    """What one configuration says about layers.

    Args:
        name: label of the adapter, for errors.
        config: a configuration that `check_config` let pass.
    """

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        self._name = name
        self._seconds = MOST_SECONDS
        self._compiled: dict[str, Any] = {}
        self._rank, self._alpha = config["r"], config["lora_alpha"]
        self._patterns = {field: _Pattern(config.get(field) or {}) for field in ("rank_pattern", "alpha_pattern")}
        self._is_rslora = bool(config.get("use_rslora"))
        self.targets = config.get("target_modules")
        self._excluded = _names(config.get("exclude_modules"))
        self._targets = _names(config.get("target_modules"))
        layers = config.get("layers_to_transform")
        self._layers = None if layers in (None, []) else frozenset(layers if isinstance(layers, list) else [layers])
        patterns = config.get("layers_pattern") or ANY_NAME
        self._layers_patterns = [patterns] if isinstance(patterns, str) else patterns

    def has(self, path: str) -> bool:
        """Whether PEFT puts a LoRA at a layer: weights for any other layer it would ignore.

        Args:
            path: dotted path of a linear layer in the base model.

        Raises:
            AdapterError: if a pattern takes too long.
        """
        if self._excluded and self._is_named("exclude_modules", self._excluded, path):
            return False
        if self._targets is None or self._targets == "all-linear":
            return True  # PEFT chooses the layers by the architecture, which a configuration does not know
        if isinstance(self._targets, (str, PlainNames)) or path in self._targets:
            return self._is_named("target_modules", self._targets, path)
        return self._is_named("target_modules", self._targets, path) and self._is_in_layers(path)

    def scaling(self, path: str, rank: int) -> float:
        """The factor before `lora_b @ lora_a` for one layer.

        Args:
            path: dotted path of the layer in the base model.
            rank: the rank its factors have.

        Returns:
            alpha / rank, or alpha / sqrt(rank) where use_rslora is set; alpha may differ by layer (alpha_pattern).

        Raises:
            AdapterError: if the rank is not the one that the configuration states for the layer, or a pattern takes
                too long.
        """
        stated = self._by_pattern("rank_pattern", path, self._rank)
        if stated != rank:
            raise AdapterError(
                f"adapter '{self._name}' must have at {path} the rank its adapter_config.json states ({stated})",
                found=f"rank {rank}",
                remedy="correct r or rank_pattern in adapter_config.json",
            )
        alpha = self._by_pattern("alpha_pattern", path, self._alpha)
        return alpha / math.sqrt(rank) if self._is_rslora else alpha / rank

    def _by_pattern(self, field: str, path: str, default: int | float) -> int | float:
        """PEFT's rule: the first key, in order, that matches the whole path or the end of it after a dot."""
        pattern = self._patterns[field]
        if not pattern.values:
            return default
        with self._timed(field, "its keys", path):
            plain = pattern.plain.first(path)
        for number, key in pattern.expressions:
            if plain is not None and number > plain:
                break
            if self._match(field, composed(field, key), path) is not None:
                return pattern.values[number]
        return default if plain is None else pattern.values[plain]

    def _is_named(self, field: str, names: "str | frozenset[str] | PlainNames", path: str) -> bool:
        if isinstance(names, PlainNames):
            with self._timed(field, "its names", path):
                return names.first(path, whole=True) is not None
        if isinstance(names, str):
            return self._match(field, names, path, whole=True) is not None
        return path in names or any(path[at + 1 :] in names for at, sign in enumerate(path) if sign == ".")

    def _is_in_layers(self, path: str) -> bool:
        if self._layers is None:
            return True
        # The first numbered segment is the layer; a later one may be an expert of a mixture.
        for pattern in self._layers_patterns:
            if match := self._match("layers_pattern", composed("layers_pattern", pattern), path):
                return int(match["idx"]) in self._layers if len(match["idx"]) < 10 else False
        return False

    def _match(self, field: str, expression: str, path: str, *, whole: bool = False) -> Any:
        """Match an expression from the start of a path, or against the whole of it."""
        with self._timed(field, expression, path):
            if (compiled := self._compiled.get(expression)) is None:
                compiled = self._compiled[expression] = _compile(expression)
            seconds = max(1e-3, min(MOST_SECONDS_ONCE, self._seconds))
            return compiled.fullmatch(path, timeout=seconds) if whole else compiled.match(path, timeout=seconds)

    @contextmanager
    def _timed(self, field: str, expression: str, path: str) -> Iterator[None]:
        """Take what a block lasts from what all may last.

        Raises:
            AdapterError: if there is nothing left, or one match takes too long.
        """
        start = time.thread_time()  # a busy machine is no reason to refuse
        try:
            yield
            self._seconds -= time.thread_time() - start
            if self._seconds <= 0:
                raise TimeoutError
        except (TimeoutError, MemoryError, RecursionError) as error:
            raise AdapterError(
                f"adapter '{self._name}' must give patterns in {field} that can be matched in half a second",
                found=f"{expression[:200]!r} against {path[:80]}",
                remedy="write it without repetitions inside of repetitions, or list the layers by name",
            ) from error


def _compile(expression: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return regex.compile(expression)


class _Pattern:
    """A rank_pattern or alpha_pattern: its values, and its keys by their places in it."""

    def __init__(self, pattern: Mapping[str, int | float]) -> None:
        self.values = list(pattern.values())
        self.expressions = [(number, key) for number, key in enumerate(pattern) if not is_plain(key)]
        self._names = [(number, key) for number, key in enumerate(pattern) if is_plain(key)]

    @cached_property
    def plain(self) -> PlainNames:
        """The keys that are names."""
        return PlainNames((number, name) for number, key in self._names for name in plain_names(key))


def _names(names: str | Sequence[str] | None) -> str | frozenset[str] | PlainNames | None:
    if isinstance(names, str) and is_plain(names):
        return PlainNames(enumerate(plain_names(names)))
    return names if names is None or isinstance(names, str) else frozenset(names)


def composed(field: str, expression: str) -> str:
    """The expression that PEFT matches for one that stands in a field of the configuration."""
    if field in ("rank_pattern", "alpha_pattern"):
        return rf"(.*\.)?({expression})$"
    if field == "layers_pattern":
        prefix = r".*?\." if expression == ANY_NAME else r"(?:^|.*?\.)"
        return rf"{prefix}{expression}\.(?P<idx>\d+)\."
    return expression


def check_expressions(name: str, config: Mapping[str, Any]) -> None:
    """Check that the expressions of a configuration are soon compiled, and that `re` and `regex` read each alike.

    Args:
        name: label of the adapter, for errors.
        config: whose fields are of the right kinds.

    Raises:
        AdapterError: naming the field and what is wrong with it.
    """
    expressions = [(field, each) for field, each in _expressions(config) if not is_plain(each)]
    for field in dict.fromkeys(field for field, _ in expressions):
        number, length = len(expressions), sum(len(each) for _, each in expressions)
        if number > MOST_EXPRESSIONS or length > MOST_CHARACTERS:
            raise AdapterError(
                f"adapter '{name}' must give valid regular expressions in {field}, with its other patterns "
                f"{MOST_EXPRESSIONS:,} of {MOST_CHARACTERS:,} characters at most",
                found=f"{number:,} of {length:,} characters",
                remedy="give the layers by the ends of their paths, as they stand: these may be as many as there are",
            )
    for field, expression in expressions:
        _check_expression(name, field, expression)


def _expressions(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Field and text of each expression."""
    for field in ("rank_pattern", "alpha_pattern"):
        yield from ((field, key) for key in config.get(field) or {})
    for field in ("target_modules", "exclude_modules", "layers_pattern"):
        names = config.get(field) or []
        # The entries of the other lists are names, not expressions.
        if isinstance(names, str) or field == "layers_pattern":
            yield from ((field, each) for each in ([names] if isinstance(names, str) else names))


def _check_expression(name: str, field: str, expression: str) -> None:
    reason: object = None
    if _READ_OTHERWISE.search(re.sub(r"\\.", "", expression)):
        reason = "its braces are no repetition, or it has a class such as [:alpha:]"
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                re.compile(composed(field, expression))
            _compile(composed(field, expression))
        except (re.error, regex.error, OverflowError, RecursionError, MemoryError) as error:
            reason = error
    if reason is not None:
        raise AdapterError(
            f"adapter '{name}' must give valid regular expressions in {field}",
            found=f"{expression[:200]!r}: {reason}",
            remedy="correct the expression, or list the layers by name",
        ) from (reason if isinstance(reason, BaseException) else None)
