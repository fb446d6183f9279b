"""Whether a library on disk still holds what is seated in a model."""

from collections.abc import Collection, Mapping, Sequence

import torch

from lorary.errors import LibraryError
from lorary.library.store import Library
from lorary.model.layers import SeatedLayer


def check_unchanged(
    library: Library, experts: Sequence[str], layers: Mapping[str, SeatedLayer], live: Collection[str]
) -> None:
    """Refuse to take from the library what belongs to other weights than the seated ones.

    Arguments are those of `lorary.model.prepared.read_missing`.

    Raises:
        LibraryError: naming an adapter that was replaced or removed since it was seated.
    """
    for position, name in enumerate(experts):
        if name in live:
            continue
        adapter = library.get(name)
        seated = {path: layer for path, layer in layers.items() if position in layer.experts}
        is_same = set(seated) == set(adapter.modules)
        for path, layer in seated.items() if is_same else ():
            rank_index, factors = layer.rank_index(layer.experts.index(position)), adapter.modules[path]
            up = factors.lora_b.mT.to(layer.lora.up) * factors.scaling
            is_same = is_same and torch.equal(layer.lora.down[rank_index], factors.lora_a.to(layer.lora.down))
            is_same = is_same and torch.equal(layer.lora.up[rank_index], up)
        if not is_same:
            raise LibraryError(
                f"adapter '{name}' of library {library.path} must be what is seated in the model",
                found="it was replaced since",
                remedy="lorary.replace_expert, or attach the library again",
            )
