"""What routers know from data, kept in `derived/`: tensors, keyed by the weights they were computed for.

The key holds the expert's name, the content hash of its adapter and the base model, all of which a library knows of
itself at any time. So an adapter that changed asks for another key, and what was prepared for the old one is never
found. What else decided the tensors (data, rows, seed, ...) is recorded beside them: whoever has the data compares.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from lorary.errors import LibraryError
from lorary.formats.peft_files import load_tensors
from lorary.library.derived import derived_folder, derived_hashes, iterate_derived, load_derived, save_derived
from lorary.library.files import encode_json
from lorary.library.store import Library
from lorary.reading import parse_json

TENSORS_FILE, MADE_FILE = "prepared.safetensors", "made.json"
Key = dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """What was prepared under one key.

    Args:
        tensors: by path of the layer, or by what else the kind names them.
        made_of: all that decided them beside the key (data, rows, seed, ...), as values of JSON.
        notes: how it went; decides nothing.
    """

    tensors: Mapping[str, Tensor]
    made_of: Mapping[str, Any]
    notes: Mapping[str, Any]


def expert_key(library: Library, name: str) -> Key:
    """The key of what is known of one expert as it is now.

    Raises:
        LibraryError: if there is no such adapter.
    """
    return {"expert": name, "adapter": _content_hash(library, name), "base": library.base.fingerprint.digest}


def group_key(library: Library, names: Sequence[str]) -> Key:
    """The key of what is known of experts together, as they are now; their order plays no part.

    Raises:
        LibraryError: if one of them is not there.
    """
    hashes = {name: _content_hash(library, name) for name in names}
    return {"experts": hashes, "base": library.base.fingerprint.digest}


def content_key(library: Library, name: str, made_of: Mapping[str, Any]) -> Key:
    """The key of what is known of one adapter's weights, whatever its name, where all else that decides it is given.

    Raises:
        LibraryError: if there is no such adapter.
    """
    return {"adapter": _content_hash(library, name), **made_of}


def save_prepared(library: Library, kind: str, key: Key, prepared: Prepared) -> Path:
    """Store what was prepared, atomically, in the place of what was there under that key.

    Args:
        library: where to.
        kind: lower-case letters, digits and underscores.
        key: from `expert_key`, `group_key` or `content_key`.
        prepared: what to store.

    Returns:
        Its folder.

    Raises:
        LibraryError: if the library cannot be written.
    """
    tensors = {name: tensor.contiguous().cpu() for name, tensor in prepared.tensors.items()}
    record = {"made_of": dict(prepared.made_of), "notes": dict(prepared.notes)}
    files = {TENSORS_FILE: safetensors.torch.save(tensors), MADE_FILE: encode_json(record)}
    return save_derived(library.path, kind, key, files)


def load_prepared(library: Library, kind: str, key: Key) -> Prepared | None:
    """What was prepared under a key, or None where there is nothing.

    Raises:
        LibraryError: if it is damaged.
    """
    files = load_derived(library.path, kind, key)
    if files is None:
        return None
    try:
        record = parse_json(files[MADE_FILE])
        tensors = load_tensors(files[TENSORS_FILE])
        if wrong := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
            raise ValueError(f"NaN or infinity in {wrong[0]}")
        return Prepared(tensors, dict(record["made_of"]), dict(record["notes"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # the last of dtypes that torch cannot compare
        raise LibraryError(
            f"{derived_folder(library.path, kind, key)} must hold {TENSORS_FILE} and {MADE_FILE}, as they were written",
            found=f"{type(error).__name__}: {error}",
            remedy="delete the folder, then lorary library prepare",
        ) from error


def prepared_hashes(library: Library, kind: str, key: Key) -> Mapping[str, str]:
    """Hash of each file that was prepared under a key, without reading them; empty where there is nothing."""
    return derived_hashes(library.path, kind, key)


def was_prepared_before(library: Library, kind: str, name: str) -> bool:
    """Whether anything of a kind is there for an expert of that name, for whatever weights."""
    return any(
        entry.key.get("expert") == name or name in entry.key.get("experts", ())
        for entry in iterate_derived(library.path, kind)
    )


def _content_hash(library: Library, name: str) -> str:
    return str(library.provenance(name)["content_hash"])
