"""What is in a library, from its JSON files alone: nothing here brings torch, so that a listing comes at once."""

import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lorary import fetching
from lorary.axes import layer_number
from lorary.errors import LibraryError, LoraryError, UsageError
from lorary.formats.peft_reasons import CONFIG_FILE, WEIGHTS_FILE
from lorary.library.files import read_json
from lorary.library.folders import COMMITTED
from lorary.library.layout import LIBRARY_FILE, PROVENANCE_FILE, STAGING
from lorary.library.readers import is_folder, read_all
from lorary.reading import parse_json

FORMAT_VERSION = 1


def list_library(path: str | Path) -> tuple[list[dict[str, Any]], dict[str, LoraryError]]:
    """The adapters of a library: those that can be read, and for the others, by name, why they cannot be.

    All are as of one moment, whatever another process writes meanwhile. Argument and errors are those of
    `Library.open`.

    Returns:
        For each adapter name, tasks, rank, num_parameters, hash; targets: the names of the layers that it adapts, or
        None where its configuration does not list them; bytes: of its weights; changed: when its folder was last
        changed here, in UTC; origin: where it came from, None where nobody said; tags and note.
    """
    library = readable_folder(path)
    document = read_current(library)
    if missing := [key for key in ("base", "default_router") if not isinstance(document.get(key), dict)]:
        raise damaged_document(library / LIBRARY_FILE, f"no {missing[0]}")
    adapters, problems = [], {}
    for name, adapter in read_all(library, _described).items():
        if isinstance(adapter, LoraryError):
            problems[name] = adapter
        else:
            adapters.append(adapter)
    return adapters, problems


def _described(folder: Path, name: str) -> dict[str, Any]:
    provenance, note = provenance_in(folder, name), None
    if isinstance(provenance.get("note"), str):  # of an imported adapter: anybody's
        note = provenance["note"]
    try:
        size = os.stat(folder / WEIGHTS_FILE, follow_symlinks=False).st_size
    except FileNotFoundError:
        size = 0
    changed = datetime.fromtimestamp(int(os.stat(folder, follow_symlinks=False).st_mtime), UTC)
    return {
        **listed(name, provenance),
        "targets": targets_in(folder),
        "bytes": size,
        "changed": changed.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "origin": origin_in(provenance),
        "tags": tags_in(provenance),
        "note": note or "",
    }


def origin_in(provenance: Mapping[str, Any]) -> str | None:
    """Where an adapter came from: what it was added from, or how it was built."""
    source, method = provenance.get("source"), provenance.get("method")
    if isinstance(source, str):
        return source
    return f"built: {method}" if isinstance(method, str) else None


def tags_in(provenance: Mapping[str, Any]) -> list[str]:
    """The tags in a provenance, sorted; what is none is left out."""
    tags = provenance.get("tags")
    return sorted({tag for tag in tags if isinstance(tag, str)}) if isinstance(tags, list) else []


def listed(name: str, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What a listing says of one adapter, from its provenance."""
    counts = {key: provenance[key] for key in ("tasks", "rank", "num_parameters")}
    return {"name": name, **counts, "hash": provenance["content_hash"]}


def provenance_in(folder: Path, name: str) -> dict[str, Any]:
    """The provenance in an adapter's folder, checked."""
    provenance = read_json(folder / PROVENANCE_FILE)
    check_provenance(name, provenance)
    return provenance


def targets_in(folder: Path) -> list[str] | None:
    """The layers in an adapter_config.json; a damaged one is for `verify` to report."""
    try:
        targets = read_json(folder / CONFIG_FILE).get("target_modules")
    except LibraryError:
        return None
    if isinstance(targets, str):
        return [targets]
    return sorted(set(map(str, targets))) if isinstance(targets, list) else None


def targets_in_short(targets: Sequence[str]) -> str:
    """Targets as a table can show them: of paths of layers the modules, and from which layer to which.

    >>> targets_in_short(["model.layers.3.mlp.up_proj", "model.layers.4.mlp.up_proj"])
    'up_proj in 2 layers, 3 to 4'
    """
    numbers = sorted({number for target in targets if (number := layer_number(target)) is not None})
    modules = ", ".join(sorted({target.rpartition(".")[2] for target in targets}))
    return f"{modules} in {len(numbers)} layers, {numbers[0]} to {numbers[-1]}" if numbers else modules


def read_current(library: Path) -> dict[str, Any]:
    """The object in library.json, of a version that this Lorary reads.

    Raises:
        LibraryError: if the path is no library, the file is damaged, or a newer Lorary wrote it.
    """
    _check_is_library(library)
    path = library / LIBRARY_FILE
    # A change that is in force and not carried out yet may bring another one.
    coming = library / STAGING / COMMITTED
    if is_folder(library, coming):
        with suppress(LibraryError):  # the change brings none, or it has moved to its place
            return _current(path, read_json(coming / LIBRARY_FILE))
    return _current(path, read_json(path))


def parse_current(path: Path, data: bytes) -> dict[str, Any]:
    """The object in a library.json that has come from elsewhere; errors as for `read_current`.

    Args:
        path: of the file, for errors.
        data: its bytes.
    """
    try:
        document = parse_json(data)
        if not isinstance(document, dict):
            raise ValueError(f"it holds a {type(document).__name__}, not an object")
    except ValueError as error:
        raise damaged_document(path, f"ValueError: {error}") from error
    return _current(path, document)


def _current(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    version = document.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise LibraryError(
            f"{path} must have a format version this Lorary reads, up to {FORMAT_VERSION}",
            found=f"version {version}",
            remedy="pip install --upgrade lorary",
        )
    if version != FORMAT_VERSION:
        raise damaged_document(path, f"ValueError: format_version is {version!r}")
    return document


def damaged_document(path: Path, finding: str) -> LibraryError:
    """The refusal of a library.json that Lorary did not write."""
    return LibraryError(
        f"{path} must say format_version, base and default_router as Lorary writes them",
        found=finding,
        remedy="restore it from a copy: it is damaged",
    )


def _check_is_library(path: Path) -> None:
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        finding, remedy = "nothing is there", "check the path, or make a library with `lorary build`"
    except OSError as error:
        finding, remedy = error.strerror or str(error), "check the path"
    else:
        if is_folder and os.path.lexists(path / LIBRARY_FILE):
            return
        finding, remedy = "it is a file", "give the folder of a library"
        if is_folder:
            finding, remedy = f"no {LIBRARY_FILE} in it", f"give the folder of a library, or restore its {LIBRARY_FILE}"
    raise LibraryError(f"{path} must be a library", found=finding, remedy=remedy)


def check_path(path: object, what: str) -> None:
    """Refuse what is no path, such as a library that is open.

    Args:
        path: as it was given.
        what: should lie there, in words.

    Raises:
        UsageError: if it is neither a text nor a Path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise UsageError(
            f"the path of {what} must be a text or a Path",
            found=type(path).__name__,
            remedy="an open library has its folder as .path; where a library is asked for, give it as it is",
        )


def readable_folder(path: Any) -> Path:
    """The folder that a path names; of a remote, that of a copy in the cache, which is only read.

    Raises:
        UsageError: if it is no path at all, or no URL of a remote.
        LibraryError: if there is no library at that URL, or it does not answer.
    """
    check_path(path, "a library")
    return fetching.fetched(str(path)) if fetching.is_remote(path) else local_folder(path)


def local_folder(path: Any) -> Path:
    """The folder that a path names.

    Raises:
        UsageError: if it names a remote, or is no path at all.
    """
    check_path(path, "a library")
    if fetching.is_remote(path):
        raise UsageError(
            "a library that is made or changed must be a local folder",
            found=f"a URL, {str(path).partition(':')[0]}:...",
            remedy="lorary library clone URL LIB, then change LIB and push it",
        )
    if "\0" in str(path):
        raise UsageError("the path of a library must be one of a file system", found=ascii(str(path)))
    return Path(path)


def check_provenance(name: str, provenance: Mapping[str, Any]) -> None:
    """Check that a provenance has the keys that others rely on.

    Args:
        name: label of the adapter, for errors.
        provenance: as read from provenance.json.

    Raises:
        LibraryError: naming the key that is missing or of the wrong kind.
    """
    kinds = {"tasks": list, "base": dict, "content_hash": str, "files": dict, "num_parameters": int, "rank": int}
    for key, kind in kinds.items():
        if not isinstance(provenance.get(key), kind) or isinstance(provenance[key], bool):
            raise _unusable(name, f"{key} as a {kind.__name__}", provenance.get(key))
    if wrong := [task for task in provenance["tasks"] if not isinstance(task, str)]:
        raise _unusable(name, "tasks as a list of names", wrong[0])
    if not all(0 < provenance[key] < 2**63 for key in ("num_parameters", "rank")):
        raise _unusable(name, "rank and num_parameters as counts", [provenance["rank"], provenance["num_parameters"]])


def _unusable(name: str, rule: str, value: object) -> LibraryError:
    return LibraryError(
        f"{PROVENANCE_FILE} of adapter '{name}' must give {rule}",
        found=ascii(value)[:200],
        remedy="restore the file from a copy, or remove the adapter and add it again",
    )
