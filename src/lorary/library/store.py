"""The library: a folder in which every adapter is a plain PEFT directory, over one base model.

Reading takes no lock and meets whole adapters only; each change is atomic, durable, and made by one writer at a time.
"""

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lorary.adapter import Adapter
from lorary.errors import LoraryError, UsageError
from lorary.formats.peft import encode_adapter, parse_adapter
from lorary.formats.peft_files import Shape, read_files, read_shapes
from lorary.library import lock
from lorary.library.base import BaseRecord, check_fit, check_origin, check_same_base, record_of
from lorary.library.document import (
    DEFAULT_ROUTER,
    LibraryDocument,
    check_router,
    check_vacant,
    read_document,
    write_document,
)
from lorary.library.expert import Expert
from lorary.library.files import read_json, reported
from lorary.library.fingerprint import fingerprint_of_model
from lorary.library.folders import change, check_name, delete, no_adapter, put
from lorary.library.layout import ADAPTERS, LIBRARY_FILE, PROVENANCE_FILE
from lorary.library.listing import check_path, listed, local_folder, provenance_in, readable_folder, targets_in
from lorary.library.origin import check_not_stacked
from lorary.library.placing import place, placed_adapter, placed_layers
from lorary.library.presence import Presence
from lorary.library.provenance import (
    encode_provenance,
    imported_provenance,
    new_provenance,
)
from lorary.library.readers import Identity, names_in, read_all, read_stable, stamps_of
from lorary.library.verify import Problem, verify_library
from lorary.tabular import ResultTable
from lorary.terminal import printable


class Library:
    """An open library. Made by `Library.create` or `Library.open`.

    Iterating gives the names of the adapters in canonical order, which is what routed models seat experts in;
    `library[name]` tells what one of them is, and `name in library` whether it is there.

    Args:
        path: the library's folder.
        document: the content of its library.json.
    """

    def __init__(self, path: Path, document: LibraryDocument) -> None:
        self._path = path
        self._document = document
        self._presence = Presence(path, document.base)

    @classmethod
    def create(
        cls, path: str | Path, base: str | Path | nn.Module = "embedded", *, base_name: str | None = None
    ) -> "Library":
        """Make an empty library over a base model.

        Args:
            path: a folder that does not exist or is empty.
            base: 'embedded', a transformers folder, a GGUF file, a Hub id, or a live model.
            base_name: the name to record for the base instead of its own.

        Raises:
            LibraryError: if something is at the path already, or it cannot be written.
            BaseModelError: if the base model cannot be found or built.
        """
        folder = local_folder(path)
        check_vacant(folder)
        document = LibraryDocument(record_of(base, base_name), DEFAULT_ROUTER)
        is_new = not os.path.exists(folder)
        try:
            with reported(folder):
                folder.mkdir(parents=True, exist_ok=True)
            with change(folder) as root:
                check_vacant(folder)
                write_document(root, document)
        except BaseException:
            if is_new and not os.path.lexists(folder / LIBRARY_FILE):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        return cls(folder, document)

    @classmethod
    def open(cls, path: str | Path) -> "Library":
        """Open a library for reading and writing; nothing is changed by opening.

        Args:
            path: the library's folder; or the URL of a remote (`hf://user/lib@v1`, `s3://bucket/lib`), of which a copy
                in the cache is opened for reading.

        Raises:
            LibraryError: if there is no library, its library.json is damaged, a newer Lorary wrote it, or the remote
                does not answer.
            UsageError: if the URL is none of a remote.
            MissingExtraError: if the packages of that remote are not installed.
        """
        folder = readable_folder(path)
        return cls(folder, read_document(folder))

    def __repr__(self) -> str:
        router = self.default_router["router"]
        return printable(f"Library({str(self._path)!r}, base={self.base.name!r}, adapters={len(self)}, {router=!s})")

    def _repr_html_(self) -> str:
        heads = ("name", "tasks", "rank", "num_parameters")
        lines = [
            (row["name"], ", ".join(row["tasks"]), row["rank"], row["num_parameters"]) for row in self.listing()[0]
        ]
        return ResultTable(repr(self), heads, lines).to_html()

    @property
    def path(self) -> Path:
        """The library's folder."""
        return self._path

    @property
    def name(self) -> str:
        """The folder's name."""
        return self._path.resolve().name

    @property
    def base(self) -> BaseRecord:
        """Name, revision and fingerprint of the base model."""
        return self._document.base

    @property
    def default_router(self) -> dict[str, Any]:
        """Settings for a caller who gives none: router, top_k, temperature, mix, and further fields of `Routing`."""
        return dict(self._document.default_router)

    def names(self) -> list[str]:
        """The names of all adapters, sorted: the canonical order."""
        self.check_presence()
        return names_in(self._path)

    def stamps(self) -> dict[str, Identity | None]:
        """By name, what changes with each adapter that is added, replaced or removed; cheap, and of this machine."""
        self.check_presence()
        return stamps_of(self._path)

    def __len__(self) -> int:
        return len(self.names())

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __getitem__(self, name: str) -> Expert:
        """What one adapter is, without its weights.

        Raises:
            NoSuchAdapterError: if there is none of that name; it is a KeyError, too.
            LibraryError: if its provenance is damaged.
        """
        self.check_presence()
        if name not in (names := self.names()):
            raise no_adapter(self._path, str(name), names)
        return read_stable(self._path, name, partial(self._expert, name))

    def _expert(self, name: str, folder: Path) -> Expert:
        targets = targets_in(folder)
        return Expert(
            name, self._path / ADAPTERS / name, provenance_in(folder, name),
            None if targets is None else tuple(targets), partial(self.get, name),
        )  # fmt: skip

    def get(self, name: str) -> Adapter:
        """Read one adapter, its layers under the paths of the base. Hashes are not compared: `verify` does that.

        Raises:
            LibraryError: if there is no such adapter.
            AdapterError: if its files are damaged.
        """
        self.check_presence()
        adapter = parse_adapter(name, read_stable(self._path, name, lambda folder: read_files(folder, name)))
        return placed_adapter(adapter, self.base.fingerprint)

    def shapes(self, name: str) -> dict[str, Shape]:
        """The shapes of one adapter's factors by layer, without reading its weights.

        Raises:
            LibraryError: if there is no such adapter.
            AdapterError: if its file is missing, or its header damaged.
        """
        self.check_presence()
        shapes = read_stable(self._path, name, lambda folder: read_shapes(folder, name))
        return placed_layers(name, shapes, self.base.fingerprint)

    def provenance(self, name: str) -> dict[str, Any]:
        """What is recorded about one adapter: tasks, hashes, rank, base, and what its builder told.

        Raises:
            LibraryError: if there is no such adapter, or its provenance is damaged.
        """
        self.check_presence()
        return read_stable(self._path, name, lambda folder: provenance_in(folder, name))

    def describe(self) -> list[dict[str, Any]]:
        """One row for each adapter (name, tasks, rank, num_parameters, hash), read from provenance alone.

        Raises:
            LibraryError: at the first adapter whose provenance is missing or damaged; `listing` goes on.
        """
        rows, problems = self.listing()
        for error in problems.values():
            raise error
        return rows

    def listing(self) -> tuple[list[dict[str, Any]], dict[str, LoraryError]]:
        """The rows of `describe` for adapters that can be read, and for the others, by name, why they cannot be.

        All are as of one moment, whatever another process writes meanwhile.

        Raises:
            LibraryError: if the library itself cannot be read.
        """
        self.check_presence()
        rows, problems = [], {}
        for name, provenance in read_all(self._path, provenance_in).items():
            if isinstance(provenance, LoraryError):
                problems[name] = provenance
            else:
                rows.append(listed(name, provenance))
        return rows, problems

    def add(
        self,
        source: str | Path,
        name: str | None = None,
        *,
        tasks: Sequence[str] | None = None,
        force_base: bool = False,
    ) -> str:
        """Take in a PEFT LoRA directory: both files are copied byte for byte.

        Of a provenance.json that another library wrote beside them, the builder's keys (tasks, settings, ...) are
        kept. Nothing else in the folder is copied.

        Args:
            source: the directory.
            name: the adapter's name here; the folder's name by default.
            tasks: what it was trained on; what its provenance says where None.
            force_base: take it although it was trained on other weights of the same shapes.

        Returns:
            The name.

        Raises:
            UsageError: if the name cannot be one, or there is no such folder.
            AdapterError: if it is not a whole LoRA, or does not fit the base model's layers.
            BaseModelError: if it was trained on another base model.
            LibraryError: if the name is taken, or the library cannot be written.
        """
        return self._import(source, name, tasks, force_base=force_base, is_new=True)

    def replace(
        self,
        source: str | Path,
        name: str | None = None,
        *,
        tasks: Sequence[str] | None = None,
        force_base: bool = False,
    ) -> str:
        """Put a PEFT LoRA directory in the place of an adapter; readers meet the old one or the new one.

        Args and errors as for `add`, but the name must be in the library.
        """
        return self._import(source, name, tasks, force_base=force_base, is_new=False)

    def add_adapter(self, adapter: Adapter, provenance: Mapping[str, Any]) -> str:
        """Commit an adapter from memory, under its own name.

        Args:
            adapter: with a configuration that describes its factors (see `lorary.formats.peft.new_config`).
            provenance: tasks, and what else its builder knows: settings, seed, metrics, data hashes, parents, ...

        Returns:
            The name.

        Raises:
            UsageError: if the name cannot be one, or the provenance sets keys that the library computes.
            AdapterError: if configuration and factors disagree, or do not fit the base model's layers.
            LibraryError: if the name is taken, or the library cannot be written.
        """
        check_name(adapter.name)
        return self._commit(adapter.name, encode_adapter(adapter), provenance, is_new=True)

    def replace_adapter(self, adapter: Adapter, provenance: Mapping[str, Any]) -> str:
        """Put an adapter from memory in the place of the one that has its name; readers meet the old or the new one.

        Args and errors as for `add_adapter`, but the name must be in the library.
        """
        check_name(adapter.name)
        return self._commit(adapter.name, encode_adapter(adapter), provenance, is_new=False)

    def remove(self, name: str) -> None:
        """Remove an adapter.

        Raises:
            LibraryError: if there is none of that name, or the library cannot be written.
        """
        check_name(name)
        with change(self._path, self.check_presence) as root:
            delete(root, name)

    def set_default_router(self, settings: Mapping[str, Any]) -> None:
        """Record the settings for callers who give none.

        Args:
            settings: router, top_k, temperature, mix, all four, and any other fields of
                `lorary.route.setting.FIELDS` as values of JSON. Whether that router can run over these experts is
                found out when it is attached.

        Raises:
            UsageError: if a key is missing, unknown or out of range.
            RouterError: if there is no such router or mix, or the router cannot do what is asked.
        """
        check_router(settings)
        with change(self._path, self.check_presence) as root:
            document = replace(read_document(self._path), default_router=dict(settings))
            write_document(root, document)
        self._document = document

    def verify(self) -> list[Problem]:
        """Check every adapter in full against its hashes and the base model; an empty list means all is well."""
        self.check_presence()
        return verify_library(self._path, self.base)

    def check_presence(self) -> None:
        """Check that this library still lies where it was opened; each method that reads or writes does so itself.

        Raises:
            LibraryError: if its folder was moved, deleted or replaced by another.
        """
        self._presence.check()

    def build_lock(self) -> AbstractContextManager[None]:
        """The lock to hold during a whole build; refused at once, naming the process, while another build holds it."""
        self.check_presence()
        return lock.build_lock(self._path)

    def check_base(self, model: nn.Module, *, force_base: bool = False) -> None:
        """Check that a live model is this library's base; a close relative passes with a warning.

        Args:
            model: a transformers model, with or without experts seated in it.
            force_base: let unrelated weights of the same shapes pass, with a warning.

        Raises:
            BaseModelError: if architecture or shapes differ, or the weights are unrelated and not forced.
        """
        check_same_base(self.base, fingerprint_of_model(model), "the base model at hand", force_base=force_base)

    def _import(
        self, source: Any, name: str | None, tasks: Sequence[str] | None, *, force_base: bool, is_new: bool
    ) -> str:
        check_path(source, "an adapter")
        folder = Path(source)
        if name is not None:
            check_name(name)
        if not os.path.isdir(folder):
            raise UsageError(
                "the adapter to take in must be a folder", found=ascii(str(source)), remedy="check the path"
            )
        source_name = folder.resolve().name
        name = source_name if name is None else name
        check_name(name)
        files = read_files(folder, name)
        adapter = parse_adapter(name, files)
        beside = folder / PROVENANCE_FILE
        # Outside of a library links are ordinary: a download of a Hub repository is made of them.
        provenance = read_json(beside, follow_links=True) if os.path.lexists(beside) else {}
        # The name of a folder may hold bytes that are no text.
        details = imported_provenance(provenance, adapter, os.fsencode(source_name).decode("utf-8", "replace"))
        if tasks is not None:
            details["tasks"] = tasks
        check_fit(adapter, self.base)
        _warn_of_silent_layers(adapter, self.base)
        if not check_not_stacked(adapter, folder, self.base.name, self.names(), force_base=force_base):
            check_origin(adapter, provenance, self.base, force_base=force_base)
        return self._commit(name, files, details, is_new=is_new)

    def _commit(self, name: str, files: Mapping[str, bytes], details: Mapping[str, Any], *, is_new: bool) -> str:
        adapter = parse_adapter(name, files)
        check_fit(adapter, self.base)
        base = {"name": self.base.name, "fingerprint": self.base.fingerprint.digest}
        provenance = encode_provenance(name, new_provenance(adapter, files, base, details))
        with change(self._path, self.check_presence) as root:
            put(root, name, {**files, PROVENANCE_FILE: provenance}, is_new=is_new)
        return name


def _warn_of_silent_layers(adapter: Adapter, base: BaseRecord) -> None:
    """Say which layers of an adapter are left out, since no text reaches them."""
    silent = [path for path, base_path in place(adapter.modules, base.fingerprint).items() if base_path is None]
    if silent:
        warnings.warn(
            f"adapter '{adapter.name}' adapts {len(silent)} layers outside the language model of the base model "
            f"'{base.name}', the first {silent[0]}: they are left out, and only text is routed",
            stacklevel=4,
        )
