"""Whether a library on disk still holds what is seated in a model."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from lorary.errors import LibraryError
from lorary.library.store import Library
from lorary.model.beside import scaled_up
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
            seat, factors = layer.experts.index(position), adapter.modules[path]
            rank_index, lora = layer.rank_index(seat), layer.lora
            up = scaled_up(factors, None if lora.gain is None else lora.gain[seat], lora.up)
            is_same = is_same and torch.equal(lora.down[rank_index], factors.lora_a.to(lora.down))
            is_same = is_same and torch.equal(lora.up[rank_index], up)
            is_same = is_same and all(map(_are_equal, layer.further[seat], (factors.bias, factors.magnitude)))
        if not is_same:
            raise LibraryError(
                f"adapter '{name}' of library {library.path} must be what is seated in the model",
                found="it was replaced since",
                remedy="lorary.replace_expert, or attach the library again",
            )


def _are_equal(seated: Tensor | None, stored: Tensor | None) -> bool:
    if seated is None or stored is None:
        return seated is stored
    return torch.equal(seated, stored)
