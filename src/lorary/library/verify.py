"""Verify a library: every byte against its recorded hash, every adapter against its base model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorary.adapter import content_hash
from lorary.errors import LoraryError
from lorary.formats.peft import CONFIG_FILE, WEIGHTS_FILE, parse_adapter, read_files
from lorary.library.base import BaseRecord, check_fit
from lorary.library.files import read_json, sha256
from lorary.library.folders import ADAPTERS, NAME, names_in, read_stable
from lorary.library.provenance import PROVENANCE_FILE, check_provenance

KNOWN_FILES = (CONFIG_FILE, WEIGHTS_FILE, PROVENANCE_FILE)


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a library.

    Args:
        adapter: name of the adapter, or of the stray entry in the adapters folder.
        rule: what must hold.
        found: what was found instead.
        remedy: what to do.
    """

    adapter: str
    rule: str
    found: str
    remedy: str

    @classmethod
    def of(cls, adapter: str, error: LoraryError) -> "Problem":
        """An error as a problem of an adapter."""
        return cls(adapter, error.rule, error.found or "", error.remedy or "")


def verify_adapters(library: Path, base: BaseRecord) -> list[Problem]:
    """Check all adapters of a library.

    Each is read in full: hashes of files and of content, finite weights, a provenance with what others rely on,
    shapes that the base model has. Whatever else lies in the adapters folder is named too.

    Args:
        library: the library's folder.
        base: its base model.

    Returns:
        The problems in the order of the adapters' names; empty if all is well.
    """
    problems = list(_stray_entries(library))
    for name in names_in(library):
        problems.extend(_problems_of(library, name, base))
    return sorted(problems, key=lambda problem: problem.adapter)


def _stray_entries(library: Path) -> Iterator[Problem]:
    adapters = library / ADAPTERS
    entries = sorted(adapters.iterdir()) if adapters.is_dir() else []
    seen: dict[str, str] = {}
    for entry in entries:
        if not entry.is_dir() or not NAME.fullmatch(entry.name):
            rule, found = f"{adapters} must hold folders of adapters only", f"{entry.name} is none"
            yield Problem(entry.name, rule, found, "move it out of the library")
        elif (other := seen.setdefault(entry.name.casefold(), entry.name)) != entry.name:
            rule = "names of adapters must differ in more than upper and lower case"
            yield Problem(entry.name, rule, f"'{other}' is there too", "rename one of the two folders")


def _problems_of(library: Path, name: str, base: BaseRecord) -> list[Problem]:
    try:
        return read_stable(library, name, lambda folder: list(_check(folder, name, base)))
    except LoraryError as error:
        # An adapter that another process has removed since the names were listed is no problem.
        return [Problem.of(name, error)] if name in names_in(library) else []


def _check(folder: Path, name: str, base: BaseRecord) -> Iterator[Problem]:
    for stray in sorted({entry.name for entry in folder.iterdir()} - set(KNOWN_FILES)):
        rule = f"the folder of adapter '{name}' must hold {', '.join(KNOWN_FILES)} only"
        yield Problem(name, rule, stray, "move it out of the library")
    try:
        provenance = read_json(folder / PROVENANCE_FILE)
        check_provenance(name, provenance)
        yield from _check_content(folder, name, provenance, base)
    except LoraryError as error:
        yield Problem.of(name, error)


def _check_content(folder: Path, name: str, provenance: Mapping[str, Any], base: BaseRecord) -> Iterator[Problem]:
    files = read_files(folder, name)
    for file, data in files.items():
        yield from _difference(name, f"sha256 of {file}", provenance["files"].get(file), sha256(data))
    adapter = parse_adapter(name, files)
    computed = content_hash(adapter.config, adapter.tensors)
    yield from _difference(name, "content hash", provenance["content_hash"], computed)
    yield from _difference(name, "rank", provenance["rank"], adapter.rank)
    yield from _difference(name, "num_parameters", provenance["num_parameters"], adapter.num_parameters)
    recorded_base = provenance["base"].get("fingerprint")
    yield from _difference(name, "fingerprint of the base model", recorded_base, base.fingerprint.digest)
    check_fit(adapter, base)


def _difference(name: str, what: str, recorded: object, found: object) -> Iterator[Problem]:
    if recorded != found:
        rule = f"adapter '{name}' must have the {what} that its provenance records ({recorded})"
        yield Problem(name, rule, str(found), "restore the adapter from a copy, or remove it and add it again")
