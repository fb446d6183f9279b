"""What was computed before, found by the hash of what made it."""

import hashlib
import json
import os
from importlib.metadata import version
from typing import Any

from lorary.errors import LibraryError
from lorary.library.store import Library

RESULTS_FILE = "evaluation.jsonl"


class ResultCache:
    """What was computed before: one JSON line each in the library's results, found by the hash of what made it.

    Args:
        library: its folder `results/` holds the file.
        base_digest: digest of the fingerprint of the model at hand, which may be a relative of the library's base, or
            another one by force.

    Raises:
        LibraryError: if results are there and cannot be read.
    """

    def __init__(self, library: Library, base_digest: str) -> None:
        self._path = library.path / "results" / RESULTS_FILE
        self._values: dict[str, Any] = {}
        self._hashes = {row["name"]: row["hash"] for row in library.describe()}
        self._base = base_digest
        self._versions = {package: version(package) for package in ("lorary", "torch", "transformers")}
        for line in self._read().splitlines():
            try:
                entry = json.loads(line)
                self._values[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):
                continue  # a line that was cut short by a kill: it is computed again

    def _read(self) -> str:
        try:
            return self._path.read_text(encoding="utf-8", errors="replace") if self._path.exists() else ""
        except OSError as error:
            raise LibraryError(f"results must be readable at '{self._path}'", found=error) from error

    def key(self, *, with_experts: bool = True, **what: Any) -> str:
        """Hash of everything that decides a value: experts, base, software, task data and settings.

        Args:
            with_experts: False for a value of the base alone, which is the same beside any library.
            what: values of JSON.
        """
        document = {
            "experts": self._hashes if with_experts else {},
            "base": self._base,
            "versions": self._versions,
            **what,
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
        try:
            self._path.parent.mkdir(exist_ok=True)
            # A line of its own even after one that a kill cut short; empty lines are passed over.
            with open(self._path, "a", encoding="utf-8") as file:
                file.write("\n" + json.dumps({"key": key, "value": value}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise LibraryError(f"results must be writable at '{self._path}'", found=error) from error
