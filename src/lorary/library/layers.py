"""The linear layers of a base model, collapsed over layer numbers so that a large model makes a small table."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

# As models write them: `00`, `+1` or the digits of another script name no layer, though `int` would take them.
_NUMERAL = r"(?:0|[1-9][0-9]{0,8})"
NUMBER = re.compile(rf"(?<=\.){_NUMERAL}(?=\.|\Z)|^{_NUMERAL}(?=\.|\Z)")
_RANGES = re.compile(rf"{_NUMERAL}(?:-{_NUMERAL})?(?:,{_NUMERAL}(?:-{_NUMERAL})?)*")
# Far more than any model has; a document that claims more would take the memory of the machine.
MOST_LAYERS = 100_000


@dataclass(frozen=True)
class LayerShapes:
    """Which linear layers a model has, and their sizes.

    Args:
        patterns: by path with numbers replaced by `*`: (d_in, d_out, the numbers that stand for each `*`).
    """

    patterns: Mapping[str, tuple[int, int, tuple[tuple[int, ...], ...]]]

    @classmethod
    def of(cls, linears: Mapping[str, tuple[int, int]]) -> "LayerShapes":
        """Collapse a table of all layers.

        Layers that share a pattern share an entry only if they are equal in size and stand at every combination of the
        entry's numbers; otherwise each gets an entry of its own, so that no layer is claimed that the model lacks.

        Args:
            linears: (d_in, d_out) by dotted path.
        """
        groups: dict[str, list[str]] = {}
        for path in linears:
            groups.setdefault(NUMBER.sub("*", path), []).append(path)
        patterns: dict[str, tuple[int, int, tuple[tuple[int, ...], ...]]] = {}
        for pattern, paths in groups.items():
            columns = list(zip(*(map(int, NUMBER.findall(path)) for path in paths), strict=True))
            numbers = tuple(tuple(sorted(set(column))) for column in columns)
            if len({linears[path] for path in paths}) == 1 and len(paths) == prod(map(len, numbers)):
                patterns[pattern] = (*linears[paths[0]], numbers)
            else:
                patterns.update({path: (*linears[path], ()) for path in paths})
        return cls(dict(sorted(patterns.items())))

    def shape(self, path: str) -> tuple[int, int] | None:
        """(d_in, d_out) of the linear layer at a dotted path, None where the model has none there."""
        if path in self.patterns and not self.patterns[path][2]:
            return self.patterns[path][:2]
        d_in, d_out, numbers = self.patterns.get(NUMBER.sub("*", path), (0, 0, ()))
        indices = [int(number) for number in NUMBER.findall(path)]
        if not numbers or len(indices) != len(numbers):
            return None
        if not all(number in column for number, column in zip(indices, numbers, strict=True)):
            return None
        return d_in, d_out

    def __iter__(self) -> Iterator[str]:
        """The dotted paths of all layers."""
        for pattern, (_, _, numbers) in self.patterns.items():
            for combination in product(*numbers):
                parts = pattern.split("*") if numbers else [pattern]
                yield "".join(part for pair in zip(parts, [*map(str, combination), ""], strict=True) for part in pair)

    def to_json(self) -> dict[str, Any]:
        """Entries as objects: d_in, d_out, count, and for each `*` the numbers as ranges ("0-29")."""
        return {
            pattern: {
                "count": prod(map(len, numbers)),
                "d_in": d_in,
                "d_out": d_out,
                "numbers": [_to_ranges(column) for column in numbers],
            }
            for pattern, (d_in, d_out, numbers) in self.patterns.items()
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "LayerShapes":
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: if an entry is not as `to_json` writes it, or claims too many layers.
        """
        if not isinstance(document, Mapping):
            raise TypeError(f"layers must be an object, not a {type(document).__name__}")
        patterns, num_layers = {}, 0
        for pattern, entry in sorted(document.items()):
            numbers = tuple(_from_ranges(column) for column in entry["numbers"])
            num_layers += max(prod(map(len, numbers)), *map(len, numbers), 1)
            if numbers and pattern.count("*") != len(numbers):
                raise ValueError(f"the row {pattern[:80]!r} of layers must have numbers for each *")
            if num_layers > MOST_LAYERS:
                raise ValueError(f"the row {pattern[:80]!r} of layers makes them more than {MOST_LAYERS:,}")
            sizes = entry["d_in"], entry["d_out"]
            if not all(type(size) is int and 0 < size < 2**31 for size in sizes):
                raise ValueError(f"the row {pattern[:80]!r} of layers must have sizes, not {str(sizes)[:80]}")
            patterns[pattern] = (*sizes, numbers)
        return cls(patterns)


def _to_ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers as ranges: (0, 1, 2, 5) is "0-2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _from_ranges(text: str) -> tuple[int, ...]:
    if not _RANGES.fullmatch(text):
        raise ValueError(f"layer numbers are ranges such as 0-29,31, not {text[:80]!r}")
    bounds = [[int(number) for number in run.split("-")] for run in text.split(",")]
    if sum(max(0, run[-1] - run[0] + 1) for run in bounds) > MOST_LAYERS:
        raise ValueError(f"layer numbers {text[:80]!r} are more than {MOST_LAYERS:,}")
    return tuple(number for run in bounds for number in range(run[0], run[-1] + 1))
