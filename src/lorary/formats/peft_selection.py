"""Which layers an adapter_config.json selects, and with which rank and alpha: PEFT's rules, in bounded time.

PEFT matches the regular expressions of a configuration with `re`, which may take longer than anybody lives for a
pattern of twenty characters. Here they are matched by the package `regex`, which can stop; what it reads otherwise
than `re` does is refused.
"""

import math
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import regex

from lorary.errors import AdapterError

# What one match, and all matches of an adapter, may take: a thousand times what real ones do.
MOST_SECONDS_ONCE, MOST_SECONDS = 0.25, 5.0
# A list of all layers of the largest models, written as one expression.
MOST_CHARACTERS = 200_000
# A name or path as it stands: most keys of patterns are, and there may be thousands of them.
PLAIN = re.compile(r"[\w.]+", re.ASCII)
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
        self._ranks = _keys(config.get("rank_pattern") or {})
        self._alphas = _keys(config.get("alpha_pattern") or {})
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
        if isinstance(self._targets, str) or path in self._targets:
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
        stated = self._by_pattern("rank_pattern", self._ranks, path, self._rank)
        if stated != rank:
            raise AdapterError(
                f"adapter '{self._name}' must have at {path} the rank its adapter_config.json states ({stated})",
                found=f"rank {rank}",
                remedy="correct r or rank_pattern in adapter_config.json",
            )
        alpha = self._by_pattern("alpha_pattern", self._alphas, path, self._alpha)
        return alpha / math.sqrt(rank) if self._is_rslora else alpha / rank

    def _by_pattern(self, field: str, keys: Sequence["_Key"], path: str, default: int | float) -> int | float:
        """PEFT's rule: the first key, in order, that matches the whole path or the end of it after a dot."""
        for key, end, value in keys:
            if end is None or "\n" in path:
                matches = self._match(field, composed(field, key), path) is not None
            else:
                matches = path.endswith(end) and _ends_with(path, key)
            if matches:
                return value
        return default

    def _is_named(self, field: str, names: str | frozenset[str], path: str) -> bool:
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
        start = time.monotonic()
        try:
            if (compiled := self._compiled.get(expression)) is None:
                compiled = self._compiled[expression] = _compile(expression)
            seconds = min(MOST_SECONDS_ONCE, self._seconds)
            match = compiled.fullmatch(path, timeout=seconds) if whole else compiled.match(path, timeout=seconds)
            self._seconds -= time.monotonic() - start
            if self._seconds <= 0:
                raise TimeoutError
        except (TimeoutError, MemoryError, RecursionError) as error:
            raise AdapterError(
                f"adapter '{self._name}' must give patterns in {field} that can be matched within seconds",
                found=f"{expression[:200]!r} against {path[:80]}",
                remedy="write it without repetitions inside of repetitions, or list the layers by name",
            ) from error
        return match


def _ends_with(path: str, key: str) -> bool:
    """Whether a path is a key of word characters and dots, or ends with it after a dot; its dots stand for any sign."""
    start = len(path) - len(key)
    is_whole = start == 0 or (start > 0 and path[start - 1] == ".")
    return is_whole and all(sign in (".", character) for sign, character in zip(key, path[start:], strict=True))


def _compile(expression: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return regex.compile(expression)


class _Key(NamedTuple):
    """A key of a pattern, and the value it gives; where it is plain, what a path must end with to match it."""

    key: str
    end: str | None
    value: int | float


def _keys(pattern: Mapping[str, int | float]) -> list[_Key]:
    return [
        _Key(key, key.rpartition(".")[2] if PLAIN.fullmatch(key) else None, value) for key, value in pattern.items()
    ]


def _names(names: str | Sequence[str] | None) -> str | frozenset[str] | None:
    return names if names is None or isinstance(names, str) else frozenset(names)


def composed(field: str, expression: str) -> str:
    """The expression that PEFT matches for one that stands in a field of the configuration."""
    if field in ("rank_pattern", "alpha_pattern"):
        return rf"(.*\.)?({expression})$"
    if field == "layers_pattern":
        prefix = r".*?\." if expression == ANY_NAME else r"(?:^|.*?\.)"
        return rf"{prefix}{expression}\.(?P<idx>\d+)\."
    return expression


def check_expression(name: str, field: str, expression: str) -> None:
    """Check that an expression is one that `re` and `regex` read alike.

    Args:
        name: label of the adapter, for errors.
        field: of the configuration.
        expression: as it stands there.

    Raises:
        AdapterError: naming the field and what is wrong with it.
    """
    reason: object = None
    if PLAIN.fullmatch(expression):
        return
    if len(expression) > MOST_CHARACTERS:
        reason = f"it is longer than {MOST_CHARACTERS:,} characters"
    elif _READ_OTHERWISE.search(re.sub(r"\\.", "", expression)):
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
