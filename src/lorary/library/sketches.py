"""Sketches of a library's adapters, kept in `derived/`: by them similar ones are found among thousands.

Each entry holds the sketches of some adapters by their content hashes, so that a sketch is never one of other weights.
An adapter that joins adds an entry of its own; many entries become one.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from lorary.adapter import Adapter
from lorary.cluster.sketch import SIZE, DeltaSketcher
from lorary.display import Display
from lorary.errors import LibraryError
from lorary.library.derived import DerivedEntry, derived_folder, discard_derived, iterate_derived, save_derived
from lorary.library.files import encode_json
from lorary.library.listing import provenance_in
from lorary.library.readers import read_stable

KIND = "sketches"
VECTORS, DOCUMENT = "sketches.safetensors", "adapters.json"
# To be raised when the same adapter would get another sketch: older ones are then not found any more.
EDITION = 1
SEED = 42
# Entries beyond which they become one.
MOST_ENTRIES = 16
BLOCK = 1024
FEW = 32


@dataclass(frozen=True)
class Sketches:
    """Sketches of some adapters.

    Args:
        names: of the adapters, in canonical order.
        hashes: content hash of each.
        layers: for each, what is equal where two adapt the same layers; empty for an adapter that computes nothing.
        vectors: of length one, or zero; float16.
    """

    names: tuple[str, ...]
    hashes: tuple[str, ...]
    layers: tuple[str, ...]
    vectors: Float[Tensor, "experts numbers"]

    def cosines(self, position: int) -> Float[Tensor, "experts"]:
        """Estimated cosines between the update of one adapter and those of all, float32; 0 for itself."""
        vector = self.vectors[position].float()
        cosines = torch.cat([block.float() @ vector for block in self.vectors.split(BLOCK)])
        cosines[position] = 0.0
        return cosines


def library_sketches(
    library: Path,
    hashes: Mapping[str, str],
    read: Callable[[str], Adapter],
    base: str,
    *,
    most_read: int | None = None,
    needed: Collection[str] = (),
) -> tuple[Sketches, int]:
    """The sketches of a library's adapters: stored ones, and the others from their weights, which are then stored.

    Args:
        library: the library's folder; one that cannot be written gets its answer all the same, with a warning.
        hashes: content hash by name, in canonical order.
        read: reads an adapter by name.
        base: digest of the base's fingerprint, which says where layers lie.
        most_read: if more than so many adapters have no sketch, only the needed ones are read; None reads all.
        needed: names of adapters that are read in any case.

    Returns:
        The sketches, and how many adapters have none.

    Raises:
        AdapterError: if an adapter is damaged.
        LibraryError: if stored sketches are damaged, or an adapter is replaced meanwhile.
    """
    entries = [entry for entry in iterate_derived(library, KIND) if _settings(entry.key) == _settings_of(base)]
    stored = _joined([_parsed(library, entry) for entry in entries])
    place = {digest: position for position, digest in enumerate(stored.hashes)}
    missing = {digest: name for name, digest in hashes.items() if digest not in place}
    if most_read is not None and len(missing) > most_read:
        missing = {digest: name for digest, name in missing.items() if name in needed}
    if missing:
        made = _made(library, missing, read)
        stored = _joined([stored, made])
        place = {digest: position for position, digest in enumerate(stored.hashes)}
        present = _chosen(stored, sorted({place[digest] for digest in hashes.values() if digest in place}))
        _keep(library, base, entries, present if len(entries) >= MOST_ENTRIES else made)
    names = [name for name, digest in hashes.items() if digest in place]
    chosen = _chosen(stored, [place[hashes[name]] for name in names])
    return replace(chosen, names=tuple(names)), len(hashes) - len(names)


def _joined(parts: Sequence[Sketches]) -> Sketches:
    """Sketches of several entries, without names."""
    vectors = [part.vectors for part in parts]
    return Sketches(
        (),
        tuple(digest for part in parts for digest in part.hashes),
        tuple(layers for part in parts for layers in part.layers),
        torch.cat(vectors) if vectors else torch.zeros(0, SIZE**2, dtype=torch.float16),
    )


def _chosen(sketches: Sketches, places: Sequence[int]) -> Sketches:
    hashes, layers = ([values[place] for place in places] for values in (sketches.hashes, sketches.layers))
    is_all = list(places) == list(range(len(sketches.hashes)))
    vectors = sketches.vectors if is_all else sketches.vectors[torch.tensor(places, dtype=torch.int64)]
    return Sketches((), tuple(hashes), tuple(layers), vectors)


def layers_of(adapter: Adapter) -> str:
    """What is equal for adapters of the same layers, whatever their ranks."""
    return hashlib.sha256("\n".join(adapter.modules).encode()).hexdigest()[:16]


def unit_sketch(sketcher: DeltaSketcher, adapter: Adapter) -> Float[Tensor, "numbers"]:
    """The sketch of one adapter as it is stored: of length one, or zero; float16."""
    sketch = sketcher(adapter).double()
    norm = sketch.norm()
    return (sketch / norm if norm > 0 else sketch).half()


def _settings_of(base: str) -> dict[str, Any]:
    return {"base": base, "edition": EDITION, "seed": SEED, "size": SIZE}


def _settings(key: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in key.items() if name != "adapters"}


def _made(library: Path, missing: Mapping[str, str], read: Callable[[str], Adapter]) -> Sketches:
    """The sketches of adapters by content hash, from their weights."""
    sketcher, layers, vectors = DeltaSketcher(SIZE, SEED), [], torch.empty(len(missing), SIZE**2, dtype=torch.float16)
    # A few are done before anyone could read of it.
    with Display().bar("sketching adapters", len(missing)) if len(missing) > FEW else nullcontext() as bar:
        for place, (digest, name) in enumerate(missing.items()):
            adapter = read(name)
            if read_stable(library, name, partial(provenance_in, name=name))["content_hash"] != digest:
                raise LibraryError(
                    f"the adapters of library {library} must stay as they are while they are compared",
                    found=f"'{name}' was replaced",
                    remedy="repeat the command",
                )
            vectors[place] = unit_sketch(sketcher, adapter)
            layers.append(layers_of(adapter) if bool(vectors[place].any()) else "")
            if bar is not None:
                bar.advance(name)
    return Sketches((), tuple(missing), tuple(layers), vectors)


def _keep(library: Path, base: str, entries: Sequence[DerivedEntry], kept: Sketches) -> None:
    """Store sketches; where there are too many entries, these are all that are of use, and take their place."""
    key = {**_settings_of(base), "adapters": sorted(kept.hashes)}
    document = {"hashes": list(kept.hashes), "layers": list(kept.layers)}
    files = {VECTORS: safetensors.torch.save({"sketches": kept.vectors}), DOCUMENT: encode_json(document)}
    try:
        saved = save_derived(library, KIND, key, files)
        if len(entries) >= MOST_ENTRIES:
            discard_derived(
                library, {derived_folder(library, KIND, entry.key).name for entry in entries} - {saved.name}
            )
    except LibraryError as error:
        warnings.warn(f"the sketches are not stored: {error.rule} (found: {error.found})", stacklevel=2)


def _parsed(library: Path, entry: DerivedEntry) -> Sketches:
    try:
        document = json.loads(entry.files[DOCUMENT])
        vectors = safetensors.torch.load(entry.files[VECTORS])["sketches"]
        hashes, layers = (tuple(map(str, document[part])) for part in ("hashes", "layers"))
        if (vectors.shape, vectors.dtype, len(layers)) != ((len(hashes), SIZE**2), torch.float16, len(hashes)):
            raise ValueError(f"{len(hashes)} adapters, {len(layers)} sets of layers, vectors {tuple(vectors.shape)}")
        return Sketches((), hashes, layers, vectors)
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise LibraryError(
            f"{derived_folder(library, KIND, entry.key)} must hold {DOCUMENT} and {VECTORS}, as they were written",
            found=f"{type(error).__name__}: {error}",
            remedy="delete the folder",
        ) from error
