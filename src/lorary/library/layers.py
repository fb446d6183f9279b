"""The linear layers of a base model, collapsed over layer numbers so that a large model makes a small table."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")

# More linear layers than any model has.
MOST_LAYERS = 1_000_000


@dataclass(frozen=True)
class LayerShapes:
    """Which linear layers a model has, and their sizes.

    Args:
        rows: by path with numbers replaced by `*`: (d_in, d_out, the numbers that stand for each `*`).
    """

    rows: Mapping[str, tuple[int, int, tuple[tuple[int, ...], ...]]]

    @classmethod
    def of(cls, linears: Mapping[str, tuple[int, int]]) -> "LayerShapes":
        """Collapse a table of all layers.

        Layers that share a pattern share a row only if they are equal in size and stand at every combination of the
        row's numbers; otherwise each gets a row of its own, so that nothing is claimed that the model does not have.

        Args:
            linears: (d_in, d_out) by dotted path.
        """
        groups: dict[str, list[str]] = {}
        for path in linears:
            groups.setdefault(NUMBER.sub("*", path), []).append(path)
        rows: dict[str, tuple[int, int, tuple[tuple[int, ...], ...]]] = {}
        for pattern, paths in groups.items():
            columns = list(zip(*(map(int, NUMBER.findall(path)) for path in paths), strict=True))
            numbers = tuple(tuple(sorted(set(column))) for column in columns)
            if len({linears[path] for path in paths}) == 1 and len(paths) == prod(map(len, numbers)):
                rows[pattern] = (*linears[paths[0]], numbers)
            else:
                rows.update({path: (*linears[path], ()) for path in paths})
        return cls(dict(sorted(rows.items())))

    def shape(self, path: str) -> tuple[int, int] | None:
        """(d_in, d_out) of the linear layer at a dotted path, None where the model has none there."""
        if path in self.rows and not self.rows[path][2]:
            return self.rows[path][:2]
        d_in, d_out, numbers = self.rows.get(NUMBER.sub("*", path), (0, 0, ()))
        found = [int(number) for number in NUMBER.findall(path)]
        if not numbers or not all(number in column for number, column in zip(found, numbers, strict=True)):
            return None
        return d_in, d_out

    def __iter__(self) -> Iterator[str]:
        """The dotted paths of all layers."""
        for pattern, (_, _, numbers) in self.rows.items():
            for combination in product(*numbers):
                parts = pattern.split("*") if numbers else [pattern]
                yield "".join(part for pair in zip(parts, [*map(str, combination), ""], strict=True) for part in pair)

    def to_json(self) -> dict[str, Any]:
        """Rows as objects: d_in, d_out, count, and for each `*` the numbers as ranges ("0-29")."""
        return {
            pattern: {
                "count": prod(map(len, numbers)),
                "d_in": d_in,
                "d_out": d_out,
                "numbers": [_to_ranges(column) for column in numbers],
            }
            for pattern, (d_in, d_out, numbers) in self.rows.items()
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "LayerShapes":
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: if a key is missing or of the wrong kind, or it names too many layers.
        """
        shapes = cls({
            pattern: (int(row["d_in"]), int(row["d_out"]), tuple(_from_ranges(column) for column in row["numbers"]))
            for pattern, row in sorted(document.items())
        })  # fmt: skip
        if sum(prod(map(len, numbers)) for _, _, numbers in shapes.rows.values()) > MOST_LAYERS:
            raise ValueError(f"more than {MOST_LAYERS:,} layers")
        return shapes


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
    bounds = [[int(number) for number in run.split("-")] for run in text.split(",")]
    if sum(run[-1] - run[0] + 1 for run in bounds) > MOST_LAYERS:
        raise ValueError(f"more than {MOST_LAYERS:,} numbers in {text[:80]!r}")
    return tuple(number for run in bounds for number in range(run[0], run[-1] + 1))
