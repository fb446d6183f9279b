"""What was computed before, found by the hash of what made it."""

import hashlib
import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from lorary.errors import LibraryError
from lorary.library.handles import check_kind, kind_of, opened
from lorary.library.layout import RESULTS
from lorary.library.store import Library
from lorary.reading import open_regular, parse_json

RESULTS_FILE = "evaluation.jsonl"
# Longer than any line that is written: a value is a score of a task, with its losses or answers by row.
MAX_LINE_BYTES = 64 * 1024 * 1024
PACKAGES = ("lorary", "torch", "transformers", "tokenizers")


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
        for line in self._lines():
            try:
                entry = parse_json(line)
                self._values[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):
                continue  # a line that was cut short by a kill: it is computed again

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

    def _lines(self) -> Iterator[bytes]:
        """The lines that were written before. One that is longer than any that is written comes in useless pieces."""
        self._library.check_presence()
        for path in (self._path.parent, self._path):
            check_kind(path, "file" if path == self._path else "folder", kind_of(path))
        if not os.path.lexists(self._path):
            return
        try:
            with open_regular(self._path, follow_links=False) as file:
                while line := file.readline(MAX_LINE_BYTES):
                    yield line
        except OSError as error:
            raise LibraryError(f"results must be readable at '{self._path}'", found=error) from error

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
