"""Verify a library: every byte against its recorded hash, every adapter against its base model."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorary.adapter import content_hash
from lorary.errors import AdapterError, LibraryError, LoraryError
from lorary.formats.peft import parse_adapter
from lorary.formats.peft_files import read_files
from lorary.formats.peft_reasons import CONFIG_FILE, WEIGHTS_FILE
from lorary.library.base import BaseRecord, check_fit
from lorary.library.derived import damaged_derived
from lorary.library.files import read_json, sha256
from lorary.library.folders import NAME, check_name
from lorary.library.handles import check_kind, kind_of
from lorary.library.layout import ADAPTERS, ASIDE, DERIVED, PLACES, PROVENANCE_FILE, STAGING, odd_entries
from lorary.library.listing import check_provenance
from lorary.library.problem import Problem
from lorary.library.readers import read_all
from lorary.reading import parse_json

KNOWN_FILES = (CONFIG_FILE, WEIGHTS_FILE, PROVENANCE_FILE)


def verify_library(library: Path, base: BaseRecord) -> list[Problem]:
    """Check all that lies in a library.

    Each adapter is read in full: hashes of files and of content, finite weights, a provenance with what others rely
    on, shapes that the base model has. Whatever else lies in the adapters folder is named too, and anywhere in the
    library what is neither folder nor file: a link, through which nothing is read or written, a FIFO, a device.

    Args:
        library: the library's folder.
        base: its base model.

    Returns:
        The problems in the order of the adapters' names; empty if all is well.

    Raises:
        LibraryError: if the library never holds still.
    """
    problems = [*_odd_places(library), *_stray_entries(library)]
    if all(kind_of(library / folder) in (None, "folder") for folder in (ADAPTERS, STAGING, DERIVED)):
        checked = read_all(library, lambda folder, name: list(_check(folder, name, base)))
        for name, result in checked.items():
            problems.extend([Problem.of(name, result)] if isinstance(result, LoraryError) else result)
        problems.extend(Problem.of(f"{DERIVED}/{name}", error) for name, error in damaged_derived(library))
    return sorted(dict.fromkeys(problems), key=lambda problem: problem.adapter)


def _odd_places(library: Path) -> Iterator[Problem]:
    """What in a library is neither folder nor file where it has to be one; adapters are looked at on their own."""
    for name, expected in PLACES.items():
        paths = [(library / name, kind_of(library / name))]
        if expected == "folder" and name != ASIDE:  # what a repair put aside may be anything
            paths.extend(path for path in odd_entries(library / name) if path[0].parent != library / ADAPTERS)
        for path, actual in paths:
            try:
                check_kind(path, expected if path == library / name else "file", actual)
            except LibraryError as error:
                yield Problem.of(shown_name(str(path.relative_to(library))), error)


def shown_name(name: str) -> str:
    """A name that somebody else gave, as a problem shows it."""
    return ascii(name)[1:-1]


def _stray_entries(library: Path) -> Iterator[Problem]:
    adapters = library / ADAPTERS
    spellings: dict[str, str] = {}
    for name in sorted(os.listdir(adapters)) if kind_of(adapters) == "folder" else []:
        shown, kind = shown_name(name), kind_of(adapters / name)
        if kind is None:  # another process took it out meanwhile
            continue
        if not NAME.fullmatch(name) or kind not in ("folder", "symbolic link"):
            rule = f"{adapters} must hold folders of adapters only"
            yield Problem(shown, rule, f"{shown} is none", "move it out of the library")
        elif (earlier := spellings.setdefault(name.casefold(), name)) != name:
            rule = "names of adapters must differ in more than upper and lower case"
            yield Problem(name, rule, f"'{earlier}' is there too", "rename one of the two folders")


def _check(folder: Path, name: str, base: BaseRecord) -> Iterator[Problem]:
    for stray in sorted(set(os.listdir(folder)) - set(KNOWN_FILES)):
        rule = f"the folder of adapter '{name}' must hold {', '.join(KNOWN_FILES)} only"
        yield Problem(name, rule, ascii(stray)[1:-1], "move it out of the library")
    try:
        provenance = read_json(folder / PROVENANCE_FILE)
        check_provenance(name, provenance)
        yield from _check_content(name, read_files(folder, name), provenance, base)
    except LoraryError as error:
        yield Problem.of(name, error)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        # Whatever a damaged file makes of the arithmetic, the other adapters are still to be checked.
        rule = f"adapter '{name}' must hold values that can be computed with"
        yield Problem(name, rule, f"{type(error).__name__}: {error}"[:200], "remove it and add it again")


def check_arrived(name: str, files: Mapping[str, bytes], base: BaseRecord) -> None:
    """Check an adapter that has come from elsewhere as `verify_library` checks one that is there.

    Args:
        name: that it is to have.
        files: content of PEFT's two files and provenance.json.
        base: the library's base model.

    Raises:
        LoraryError: saying what is wrong first.
    """
    check_name(name)
    try:
        provenance = parse_json(files[PROVENANCE_FILE])
        if not isinstance(provenance, dict):
            raise ValueError(f"it holds a {type(provenance).__name__}, not an object")
    except ValueError as error:
        raise LibraryError(f"{PROVENANCE_FILE} of adapter '{name}' must hold one JSON object", found=error) from error
    check_provenance(name, provenance)
    peft_files = {file: files[file] for file in (CONFIG_FILE, WEIGHTS_FILE)}
    try:
        problems = list(_check_content(name, peft_files, provenance, base))
    except (ArithmeticError, LookupError, TypeError) as error:
        rule = f"adapter '{name}' must hold values that can be computed with"
        raise LibraryError(rule, found=f"{type(error).__name__}: {error}"[:200]) from error
    for problem in problems:
        raise LibraryError(problem.rule, found=problem.found, remedy=problem.remedy)


def _check_content(
    name: str, files: Mapping[str, bytes], provenance: Mapping[str, Any], base: BaseRecord
) -> Iterator[Problem]:
    yield from _changed_files(name, provenance, files)
    adapter = parse_adapter(name, files)
    computed = content_hash(adapter.config, adapter.tensors)
    yield from _difference(name, "content hash", provenance["content_hash"], computed)
    yield from _difference(name, "rank", provenance["rank"], adapter.rank)
    yield from _difference(name, "num_parameters", provenance["num_parameters"], adapter.num_parameters)
    recorded_base = provenance["base"].get("fingerprint")
    yield from _difference(name, "fingerprint of the base model", recorded_base, base.fingerprint.digest)
    check_fit(adapter, base)


def check_files(folder: Path, name: str, provenance: Mapping[str, Any]) -> None:
    """Compare the files of an adapter with the hashes that its provenance records; the least that a whole one passes.

    Args:
        folder: that holds them.
        name: of the adapter.
        provenance: of the adapter, checked.

    Raises:
        AdapterError: if a file is missing, or other than recorded.
    """
    for problem in _changed_files(name, provenance, read_files(folder, name)):
        raise AdapterError(problem.rule, found=problem.found, remedy=problem.remedy)


def _changed_files(name: str, provenance: Mapping[str, Any], files: Mapping[str, bytes]) -> Iterator[Problem]:
    for file, data in files.items():
        yield from _difference(name, f"sha256 of {file}", provenance["files"].get(file), sha256(data))


def _difference(name: str, field: str, recorded: object, actual: object) -> Iterator[Problem]:
    if recorded != actual:
        rule = f"adapter '{name}' must have the {field} that its provenance records ({recorded})"
        yield Problem(name, rule, str(actual), "restore the adapter from a copy, or remove it and add it again")
