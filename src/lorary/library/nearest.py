"""Which adapters of a library are alike: the nearest of one, and those that are there twice or nearly so.

Sketches choose the candidates, and the cosines between whole updates decide, as for clusters.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from lorary.adapter import Adapter
from lorary.cluster.similarity import adapter_similarity
from lorary.cluster.sketch import SIZE, DeltaSketcher
from lorary.library.sketches import BLOCK, SEED, Sketches, layers_of, unit_sketch

# Updates of a larger cosine are nearly the same, whatever their sizes.
NEAR = 0.99
# What a sketch says of such a pair at least: its error is largest where few layers are adapted.
NEAR_BY_SKETCH = 0.95
# Candidates whose weights are read: for the nearest so many times those that are asked for, and so many at least.
TIMES, CANDIDATES = 4, 32
NEAR_CANDIDATES = 8

Read = Callable[[str], Adapter]


@dataclass(frozen=True)
class Duplicate:
    """An adapter that is there twice, or nearly so.

    Args:
        name: of the adapter.
        other: the earlier one that it is like.
        cosine: between their updates.
        is_same: whether both have the same content hash.
    """

    name: str
    other: str
    cosine: float
    is_same: bool


def nearest(sketches: Sketches, name: str, k: int, read: Read) -> list[tuple[str, float]]:
    """The adapters whose updates have the largest cosines with that of one, best first.

    Args:
        sketches: of all adapters.
        name: of the one.
        k: how many, at least 1.
        read: reads an adapter by name.

    Returns:
        Name and cosine; fewer where there are fewer, none where the adapter computes nothing.

    Raises:
        AdapterError: if an adapter is damaged.
    """
    position = sketches.names.index(name)
    alive = torch.tensor([layers != "" for layers in sketches.layers])
    if not alive[position]:
        return []
    estimated = sketches.cosines(position).masked_fill(~alive, -torch.inf)
    estimated[position] = -torch.inf
    number = min(max(TIMES * k, CANDIDATES), int(alive.sum()) - 1)
    others = [sketches.names[place] for place in estimated.topk(number).indices.tolist()]
    return _exact(name, others, read)[:k]


def duplicates(sketches: Sketches, read: Read, among: Sequence[str] | None = None) -> list[Duplicate]:
    """The adapters that are there twice, or whose update has nearly the direction of an earlier one's.

    Only adapters of the same layers are compared. It costs one product of all sketches, and the weights of candidates.

    Args:
        sketches: of all adapters.
        read: reads an adapter by name.
        among: names of adapters that are to be compared with all others, the earlier ones first; all where None, in
            canonical order.

    Returns:
        One for each such adapter, with the most similar earlier one; of `among`, with any that is not among them.
    """
    # Where only some are compared, all others count as earlier.
    rank = {name: number for number, name in enumerate(sketches.names if among is None else among)}
    order = [rank.get(name, -1) for name in sketches.names]
    asked = [position for position in range(len(order)) if order[position] >= 0]
    first: dict[str, int] = {}
    for position in sorted(range(len(order)), key=order.__getitem__):
        first.setdefault(sketches.hashes[position], position)
    found = []
    for position, others in _candidates(sketches, asked, torch.tensor(order)):
        name, same = sketches.names[position], first[sketches.hashes[position]]
        if same != position:
            found.append(Duplicate(name, sketches.names[same], 1.0, is_same=True))
        elif others and sketches.layers[position]:
            other, cosine = _exact(name, [sketches.names[other] for other in others], read)[0]
            if cosine > NEAR:
                found.append(Duplicate(name, other, cosine, is_same=False))
    return found


def joined(sketches: Sketches, adapters: Iterable[tuple[str, Adapter]]) -> Sketches:
    """Sketches with those of further adapters behind them.

    Args:
        sketches: of some adapters.
        adapters: content hash and adapter of each further one; consumed one at a time.
    """
    sketcher, vectors = DeltaSketcher(SIZE, SEED), [sketches.vectors]
    names, hashes, layers = list(sketches.names), list(sketches.hashes), list(sketches.layers)
    for digest, adapter in adapters:
        vector = unit_sketch(sketcher, adapter)
        names.append(adapter.name)
        hashes.append(digest)
        layers.append(layers_of(adapter) if bool(vector.any()) else "")
        vectors.append(vector[None])
    return Sketches(tuple(names), tuple(hashes), tuple(layers), torch.cat(vectors))


def _candidates(sketches: Sketches, asked: Sequence[int], order: torch.Tensor) -> Iterator[tuple[int, list[int]]]:
    """Each position that is asked for, with the earlier ones that may be like it, the most similar first."""
    kinds = {layers: number for number, layers in enumerate(dict.fromkeys(sketches.layers))}
    kind = torch.tensor([kinds[layers] for layers in sketches.layers])
    vectors = sketches.vectors.float()
    for block in torch.tensor(asked).split(BLOCK) if asked else ():
        cosines = vectors[block] @ vectors.mT
        cosines[(kind[block, None] != kind) | (order >= order[block, None])] = 0.0
        values, places = cosines.topk(min(NEAR_CANDIDATES, len(order)), dim=1)
        for position, row, others in zip(block.tolist(), values.tolist(), places.tolist(), strict=True):
            yield position, [other for other, cosine in zip(others, row, strict=True) if cosine > NEAR_BY_SKETCH]


def _exact(name: str, others: Sequence[str], read: Read) -> list[tuple[str, float]]:
    cosines = adapter_similarity(map(read, [name, *others]))[0, 1:]
    return sorted(zip(others, cosines.tolist(), strict=True), key=lambda pair: -pair[1])
