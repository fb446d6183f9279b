"""What was computed before, found by the hash of what made it."""

import hashlib
import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from lorary.errors import LibraryError
from lorary.library.handles import opened
from lorary.library.layout import RESULTS, RESULTS_FILE
from lorary.library.result_lines import result_lines
from lorary.library.store import Library
from lorary.reading import parse_json

PACKAGES = ("lorary", "torch", "transformers", "tokenizers")


def stored_values(library: Library) -> Iterator[tuple[str, Any]]:
    """Key and value of each line of a library's results, in the order in which they were written.

    A line that a kill cut short is passed over.

    Args:
        library: its folder `results/` holds the file; there may be none.

    Raises:
        LibraryError: if results are there and cannot be read.
    """
    library.check_presence()
    for line in result_lines(library.path):
        try:
            entry = parse_json(line)
            key, value = entry["key"], entry["value"]
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(key, str):
            yield key, value


class ResultCache:
    """What was computed before: one JSON line each in the library's results, found by the hash of what made it.

    Args:
        library: its folder `results/` holds the file.
        base_content: hash of what the model at hand computes with (`lorary.library.base_content`): it may be a relative
            of the library's base, or another one by force.

    Raises:
        LibraryError: if results are there and cannot be read.
    """

    def __init__(self, library: Library, base_content: str) -> None:
        self._path = library.path / RESULTS / RESULTS_FILE
        self._values: dict[str, Any] = {}
        self._library = library
        self._hashes = self._read_hashes()
        self._base = base_content
        self._versions = {package: version(package) for package in PACKAGES}
        self._values.update(stored_values(library))

    def check_experts(self) -> None:
        """Refuse experts that are no longer those by which values are found.

        Raises:
            LibraryError: if one was replaced, added or removed.
        """
        if self._read_hashes() != self._hashes:
            raise LibraryError(
                f"the experts of library '{self._library.path}' must stay as they are while it is evaluated",
                found="others than at the start",
                remedy="repeat the command",
            )

    def _read_hashes(self) -> dict[str, str]:
        return {row["name"]: row["hash"] for row in self._library.describe()}

    def key(self, *, with_experts: bool = True, **inputs: Any) -> str:
        """Hash of everything that decides a value: experts, base, software, task data and settings.

        Args:
            with_experts: False for a value of the base alone, which is the same beside any library.
            inputs: values of JSON.
        """
        document = {
            "experts": self._hashes if with_experts else {},
            "base": self._base,
            "versions": self._versions,
            **inputs,
        }
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> Any:
        """The value of a key, or None if it was not computed before."""
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Append a value, which JSON can hold.

        Raises:
            LibraryError: if the results cannot be written.
        """
        self._values[key] = value
        self._library.check_presence()
        try:
            with (
                opened(self._library.path) as root,
                root.enter(RESULTS, make=True) as folder,
                os.fdopen(folder.append(RESULTS_FILE), "a", encoding="utf-8") as file,
            ):
                # A line of its own even after one that a kill cut short; empty lines are passed over.
                file.write("\n" + json.dumps({"key": key, "value": value}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise LibraryError(f"results must be writable at '{self._path}'", found=error) from error
