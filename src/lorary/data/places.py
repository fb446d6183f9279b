"""Where the tokens of each row lie in a sequence that many rows share: what attention must be told."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

# Rows share a block of attention as long as none is shorter than this part of its longest.
LEAST_FILL = 0.75


class Places(NamedTuple):
    """Rows in blocks of similar length, padded on the right, and the way back.

    A *place* is one position of one row; the places of all blocks, row by row, stand one after another.

    Args:
        shapes: (rows, longest row) of each block.
        tokens: for each place the token that stands there; any token where it is padding.
        owners: for each token the place of the first row that holds it.
        repeats: places of tokens that an earlier row holds too.
    """

    shapes: tuple[tuple[int, int], ...]
    tokens: Int[Tensor, " places"]
    owners: Int[Tensor, " tokens"]
    repeats: Int[Tensor, " repeats"]

    def to(self, device: torch.device) -> "Places":
        """The same places on a device."""
        return Places(self.shapes, *(tensor.to(device) for tensor in self[1:]))


def places_of(rows: Sequence[Sequence[int]]) -> Places:
    """Gather rows into blocks.

    Args:
        rows: where in the sequence the tokens of each row lie; together they cover it.

    Returns:
        The places, on the CPU.
    """
    blocks: list[list[Sequence[int]]] = []
    for row in sorted(rows, key=lambda row: -len(row)):
        if blocks and len(row) >= LEAST_FILL * len(blocks[-1][0]):
            blocks[-1].append(row)
        else:
            blocks.append([row])
    tokens: list[int] = []
    owners: dict[int, int] = {}
    repeats: list[int] = []
    for block in blocks:
        for row in block:
            for place, token in enumerate(row, start=len(tokens)):
                if owners.setdefault(token, place) != place:
                    repeats.append(place)
            tokens += [*row, *([row[-1]] * (len(block[0]) - len(row)))]
    shapes = tuple((len(block), len(block[0])) for block in blocks)
    order = [owners[token] for token in range(len(owners))]
    return Places(shapes, torch.tensor(tokens), torch.tensor(order), torch.tensor(repeats, dtype=torch.long))
