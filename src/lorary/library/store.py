"""The library: a folder in which every adapter is a plain PEFT directory, over one base model.

Reading takes no lock and meets whole adapters only; each change is atomic, durable, and made by one writer at a time.
"""

import os
import shutil
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lorary import fetching
from lorary.adapter import Adapter
from lorary.errors import LibraryError, LoraryError, UsageError
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
from lorary.library.folders import change, check_free, check_name, delete, no_adapter, put
from lorary.library.handles import opened
from lorary.library.layout import ADAPTERS, LIBRARY_FILE, PROVENANCE_FILE
from lorary.library.listing import (
    check_path,
    list_library,
    listed,
    local_folder,
    provenance_in,
    readable_folder,
    targets_in,
)
from lorary.library.nearest import Duplicate, duplicates, joined, nearest
from lorary.library.notes import change_note, change_tags
from lorary.library.origin import check_not_stacked
from lorary.library.placing import place, placed_adapter, placed_layers
from lorary.library.presence import Presence
from lorary.library.problem import Problem
from lorary.library.provenance import (
    encode_provenance,
    imported_provenance,
    new_provenance,
)
from lorary.library.readers import Identity, names_in, read_all, read_stable, stamps_of
from lorary.library.renaming import rename_adapter
from lorary.library.signing import sign_library, verify_signature
from lorary.library.sketches import Sketches, library_sketches
from lorary.library.snapshot import Rollback, Snapshot
from lorary.library.verify import verify_library
from lorary.tabular import ResultTable, to_pandas, to_polars
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

    def nearest(self, name: str, k: int = 5) -> list[tuple[str, float]]:
        """The adapters that are most like one, by the cosine between their whole updates.

        Sketches choose candidates, and the cosines are exact. The first call reads each adapter once and stores its
        sketch in `derived/`; later ones read the candidates alone.

        Args:
            name: of the adapter.
            k: how many, at least 1.

        Returns:
            Name and cosine of each, best first; none where the adapter computes nothing.

        Raises:
            NoSuchAdapterError: if there is none of that name.
            UsageError: if k is less than 1.
            LibraryError: if an adapter's provenance is damaged.
            AdapterError: if an adapter's files are damaged.
        """
        if k < 1:
            raise UsageError("there must be at least one adapter to look for", found=f"k = {k}")
        hashes = self._hashes()
        if name not in hashes:
            raise no_adapter(self._path, name, list(hashes))
        return nearest(self._sketches(hashes)[0], name, k, self.get)

    def duplicates(self) -> list[Duplicate]:
        """The adapters that are there twice, or whose update has nearly the direction of an earlier one's.

        A cosine above 0.99 is nearly the same direction. Only adapters of the same layers are compared.

        Raises:
            LibraryError: if an adapter's provenance is damaged.
            AdapterError: if an adapter's files are damaged.
        """
        return duplicates(self._sketches(self._hashes())[0], self.get)

    def duplicates_of(self, names: Sequence[str], *, most_read: int | None = None) -> tuple[list[Duplicate], int]:
        """As `duplicates`, for a few adapters beside all others.

        Args:
            names: of these adapters, the earlier ones first.
            most_read: if more than so many adapters were never sketched, those beside are left out; None reads all.

        Returns:
            What they are like, and how many adapters were left out.
        """
        sketches, unread = self._sketches(self._hashes(), most_read, names)
        return duplicates(sketches, self.get, names), unread

    def duplicates_beside(
        self, candidates: Iterable[tuple[str, Adapter]], read: Callable[[str], Adapter], *, most_read: int | None = None
    ) -> tuple[list[Duplicate], int]:
        """As `duplicates_of`, for adapters that are not in the library; nothing of them is kept.

        Args:
            candidates: content hash and adapter of each, its layers under the paths of the base; consumed one at a
                time. Their names are not in the library.
            read: reads one of them by name.
            most_read: as for `duplicates_of`.

        Returns:
            What they are like, and how many adapters of the library were left out.
        """
        hashes = self._hashes()
        sketches, unread = self._sketches(hashes, most_read)
        beside = joined(sketches, candidates)
        names = beside.names[len(sketches.names) :]
        found = duplicates(beside, lambda name: read(name) if name in names else self.get(name), names)
        # Equal hashes can be told of those that have no sketch, too.
        unsketched = (
            {digest: name for name, digest in hashes.items() if name not in {*sketches.names}} if unread else {}
        )
        told = {duplicate.name for duplicate in found if duplicate.is_same}
        same = [
            Duplicate(name, unsketched[digest], 1.0, is_same=True)
            for name, digest in zip(names, beside.hashes[len(sketches.names) :], strict=True)
            if digest in unsketched and name not in told
        ]
        told |= {duplicate.name for duplicate in same}
        return [*same, *(duplicate for duplicate in found if duplicate.is_same or duplicate.name not in told)], unread

    def _hashes(self) -> dict[str, str]:
        return {row["name"]: row["hash"] for row in self.describe()}

    def _sketches(
        self, hashes: Mapping[str, str], most_read: int | None = None, needed: Collection[str] = ()
    ) -> tuple[Sketches, int]:
        base = self.base.fingerprint.digest
        return library_sketches(self._path, hashes, self.get, base, most_read=most_read, needed=needed)

    def add(
        self,
        source: str | Path,
        name: str | None = None,
        *,
        tasks: Sequence[str] | None = None,
        force_base: bool = False,
        origin: str | None = None,
    ) -> str:
        """Take in a PEFT LoRA directory: both files are copied byte for byte.

        Of a provenance.json that another library wrote beside them, the builder's keys (tasks, settings, ...) are
        kept. Nothing else in the folder is copied.

        Args:
            source: the directory.
            name: the adapter's name here; the folder's name by default.
            tasks: what it was trained on; what its provenance says where None.
            force_base: take it although it was trained on other weights of the same shapes.
            origin: where it comes from, as it is recorded; the folder's name by default.

        Returns:
            The name.

        Raises:
            UsageError: if the name cannot be one, or there is no such folder.
            AdapterError: if it is not a whole LoRA, or does not fit the base model's layers.
            BaseModelError: if it was trained on another base model.
            LibraryError: if the name is taken, or the library cannot be written.
        """
        return self._import(source, name, tasks, origin, force_base=force_base, is_new=True)

    def examine(self, source: str | Path, name: str | None = None, *, force_base: bool = False) -> Adapter:
        """What `add` would take in, without taking it in: nothing is written.

        Args and errors are those of `add`; that the name is free is checked, too.

        Returns:
            The adapter, under the name that it would get.
        """
        adapter, _, _ = self._examined(source, name, None, force_base=force_base)
        with reported(self._path), opened(self._path) as root:
            check_free(root, adapter.name)
        return adapter

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
        return self._import(source, name, tasks, None, force_base=force_base, is_new=False)

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

    def rename(self, old: str, new: str) -> tuple[list[str], list[str]]:
        """Give an adapter another name, atomically. What was prepared of it alone follows.

        What was computed of all adapters together (clusters, cells of evaluations) is found by their names and is
        computed again.

        Returns:
            Kinds of derived data that followed, and kinds that have to be computed again.

        Raises:
            UsageError: if the new name cannot be one.
            LibraryError: if there is no such adapter, the name is taken, the default router or an assignment of
                skills names the adapter, a build is running, or the library cannot be written.
        """
        return rename_adapter(self._path, self.check_presence, old, new)

    def tag(self, name: str, add: Iterable[str] = (), remove: Iterable[str] = ()) -> list[str]:
        """Give an adapter tags, and take others from it.

        Returns:
            Its tags now, sorted.

        Raises:
            UsageError: if a tag cannot be one, or is to be there and not.
            LibraryError: if there is no such adapter, or the library cannot be written.
        """
        return change_tags(self._path, self.check_presence, name, add, remove)

    def note(self, name: str, text: str) -> None:
        """Write the note on an adapter, in the place of an earlier one; an empty text takes it away.

        Raises:
            UsageError: if it has more than 2,000 characters.
            LibraryError: if there is no such adapter, or the library cannot be written.
        """
        change_note(self._path, self.check_presence, name, text)

    def to_pandas(self) -> Any:
        """The adapters as a `pandas.DataFrame`, one line each, with the columns of `lorary library ls --json`.

        Raises:
            LibraryError: at the first adapter that cannot be read.
            MissingExtraError: if pandas is not installed.
        """
        return to_pandas(self._rows())

    def to_polars(self) -> Any:
        """The adapters as a `polars.DataFrame`, one line each, with the columns of `lorary library ls --json`.

        Raises:
            LibraryError: at the first adapter that cannot be read.
            MissingExtraError: if polars is not installed.
        """
        return to_polars(self._rows())

    def _rows(self) -> list[dict[str, Any]]:
        self.check_presence()
        rows, problems = list_library(self._path)
        for error in problems.values():
            raise error
        return rows

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

    def verify(self, *, key: str | Path | None = None, signature: str | Path | None = None) -> list[Problem]:
        """Check every adapter in full against its hashes and the base model; an empty list means all is well.

        Args:
            key: file of a public key: the library must be as its holder signed it, too.
            signature: file of the signature, where it is not the library's own.

        Raises:
            UsageError: if the key cannot be used, or a signature is given without a key.
            MissingExtraError: if a key is given and model-signing is not installed.
        """
        self.check_presence()
        if key is None and signature is not None:
            raise UsageError("a signature must be checked by a key", found="none", remedy="--key FILE")
        signed = [] if key is None else verify_signature(self._path, key, signature)
        return [*signed, *verify_library(self._path, self.base)]

    def sign(self, key: str | Path) -> Path:
        """Sign library.json and all adapters as they are.

        Args:
            key: file of a private key (PEM; curve P-256, P-384 or P-521), its password in `LORARY_SIGNING_PASSWORD`.

        Returns:
            The file of the signature.

        Raises:
            UsageError: if the key cannot be used.
            LibraryError: if the library is damaged or cannot be written.
            MissingExtraError: if model-signing is not installed.
        """
        for problem in self.verify():
            raise LibraryError(
                f"library {self._path} must be whole to be signed",
                found=f"{problem.adapter}: {problem.rule}",
                remedy="lorary library repair LIB",
            )
        return sign_library(self._path, key)

    def snapshot(self, name: str | None = None) -> Snapshot:
        """Keep the state of the library under a name, at the cost of an index: files of adapters are linked.

        Args:
            name: that it can be gone back to by; the next free number where None.

        Raises:
            UsageError: if the name cannot be one.
            LibraryError: if the name is taken, the library is damaged, or it cannot be written.
        """
        snapshot: Snapshot = fetching.of_snapshots("take_snapshot")(self, name)
        return snapshot

    def snapshots(self) -> list[Snapshot]:
        """The states that were kept, oldest first.

        Raises:
            LibraryError: if they are damaged.
        """
        self.check_presence()
        snapshots: list[Snapshot] = fetching.of_snapshots("list_snapshots")(self._path)
        return snapshots

    def rollback(self, name: str) -> Rollback:
        """Make adapters and default router what they were, at one moment; what they are now becomes a snapshot first.

        Args:
            name: of a snapshot.

        Raises:
            LibraryError: if there is no such snapshot, it or the library is damaged, or cannot be written.
        """
        rollback: Rollback = fetching.of_snapshots("roll_back")(self, name)
        self._document = read_document(self._path)
        return rollback

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
        self,
        source: Any,
        name: str | None,
        tasks: Sequence[str] | None,
        origin: str | None,
        *,
        force_base: bool,
        is_new: bool,
    ) -> str:
        adapter, files, details = self._examined(source, name, origin, force_base=force_base)
        if tasks is not None:
            details["tasks"] = tasks
        return self._commit(adapter.name, files, details, is_new=is_new)

    def _examined(
        self, source: Any, name: str | None, origin: str | None, *, force_base: bool
    ) -> tuple[Adapter, dict[str, bytes], dict[str, Any]]:
        """An adapter that may join, its files, and what is known of it; whether its name is free is not checked."""
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
        details = imported_provenance(
            provenance, adapter, origin or os.fsencode(source_name).decode("utf-8", "replace")
        )
        check_fit(adapter, self.base)
        _warn_of_silent_layers(adapter, self.base)
        if not check_not_stacked(adapter, folder, self.base.name, self.names(), force_base=force_base):
            check_origin(adapter, provenance, self.base, force_base=force_base)
        return adapter, files, details

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
            stacklevel=5,
        )
