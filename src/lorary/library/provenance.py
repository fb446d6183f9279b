"""Provenance: what an adapter is, where it came from, and the hashes that hold it to that."""

from collections.abc import Mapping
from typing import Any

from lorary.adapter import Adapter, content_hash
from lorary.errors import LibraryError, UsageError
from lorary.library.files import encode_json, sha256
from lorary.library.layout import PROVENANCE_FILE
from lorary.reading import MAX_DOCUMENT_BYTES, parse_json

# Written by the library and by nobody else, since a check against them must mean something.
COMPUTED = ("base", "content_hash", "files", "num_parameters", "rank")


def new_provenance(
    adapter: Adapter, files: Mapping[str, bytes], base: Mapping[str, str], details: Mapping[str, Any]
) -> dict[str, Any]:
    """The provenance of an adapter that enters a library. It holds no time, so that equal builds are equal bytes.

    Args:
        adapter: as read from `files`.
        files: PEFT's two files by name.
        base: name and fingerprint digest of the base model.
        details: what the caller knows: `tasks`, and any of settings, seed, metrics, data hashes, template, parents, ...

    Returns:
        A document for JSON.

    Raises:
        UsageError: if `details` sets a key that the library computes, or `tasks` is not a list of names.
    """
    if reserved := sorted(set(details) & set(COMPUTED)):
        raise UsageError(
            f"provenance of adapter '{adapter.name}' may not set what the library computes", found=", ".join(reserved)
        )
    tasks = details.get("tasks", [])
    if not isinstance(tasks, (list, tuple)) or not all(isinstance(task, str) for task in tasks):
        raise UsageError(f"provenance of adapter '{adapter.name}' must give tasks as a list of names", found=tasks)
    return {
        **details,
        "tasks": list(tasks),
        "base": dict(base),
        "content_hash": content_hash(adapter.config, adapter.tensors),
        "files": {name: sha256(data) for name, data in sorted(files.items())},
        "num_parameters": adapter.num_parameters,
        "rank": adapter.rank,
    }


def encode_provenance(name: str, provenance: Mapping[str, Any]) -> bytes:
    """The bytes of provenance.json.

    Args:
        name: label of the adapter, for errors.
        provenance: as `new_provenance` gives it.

    Raises:
        UsageError: if it holds what a JSON file cannot: NaN, half a character, a value of another kind, or more
            levels or bytes than it is read with.
    """
    try:
        data = encode_json(provenance)
        if len(data) > MAX_DOCUMENT_BYTES:
            raise ValueError(f"it has {len(data):,} bytes, more than {MAX_DOCUMENT_BYTES:,}")
        parse_json(data)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"provenance of adapter '{name}' must hold values of JSON", found=ascii(str(error))[1:201]
        ) from error
    return data


def imported_provenance(provenance: Mapping[str, Any], adapter: Adapter, source: str) -> dict[str, Any]:
    """What to keep of the provenance that lies beside an adapter which comes from another library.

    Args:
        provenance: its provenance.json, or an empty mapping where there is none of a library's making.
        adapter: the adapter as read.
        source: name of the folder it comes from.

    Returns:
        `source`; and where there is such a provenance, the keys its builder gave and `source_base`.

    Raises:
        LibraryError: if that provenance describes other weights.
    """
    recorded = provenance.get("content_hash")
    digest = content_hash(adapter.config, adapter.tensors)
    if recorded not in (None, digest):
        raise LibraryError(
            f"{PROVENANCE_FILE} beside adapter '{adapter.name}' must describe its weights",
            found=f"content hash {recorded}, weights have {digest}",
            remedy=f"copy the adapter again, or delete its {PROVENANCE_FILE} to import the weights alone",
        )
    if recorded is None:
        return {"source": source}
    fields = {key: value for key, value in provenance.items() if key not in COMPUTED}
    return {**fields, "source": source, "source_base": provenance.get("base")}
