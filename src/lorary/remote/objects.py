"""A remote that holds objects by key: what a library is made of by sha256, and one small file for each ref.

    objects/SHA256    files, pages of an index and indexes; none ever changes
    refs/main         names the index of the newest snapshot; replaced by comparing and swapping
    refs/NAME         names the index of one snapshot for ever

An index lists pages, and a page lists entries. Which page an entry is in follows from its name, so that a change of one
adapter makes one new page.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorary.errors import LibraryError
from lorary.reading import parse_json, read_regular
from lorary.remote.entries import Entries, FileRecord, check_whole, damaged, encode, parse_entries, parse_record, record
from lorary.remote.place import MAIN, Place
from lorary.remote.remotes import Head, Push
from lorary.remote.store import AbsentError, StaleError, Store, Traffic, retried
from lorary.remote.workers import each

FORMAT_VERSION = 1
# Entries of one page, about.
PAGE_ENTRIES = 64
# So many objects are asked for one by one; more are listed.
MOST_ASKED = 64


class ObjectRemote:
    """A library as objects of a store.

    Args:
        place: for messages.
        store: holds the objects.
        traffic: where the store counts its requests.
    """

    def __init__(self, place: Place, store: Store, traffic: Traffic) -> None:
        self.place, self.traffic = place, traffic
        self._store = store

    def head(self, ref: str) -> Head | None:
        """The index that a ref names."""
        if self.place.is_digest and ref == self.place.ref:
            return Head(ref, ref)
        try:
            fetched = self._retried(lambda: self._store.get(f"refs/{ref}"))
        except AbsentError:
            return None
        document = self._parsed(fetched.data)
        snapshot = document.get("snapshot")
        if not isinstance(snapshot, str) or len(snapshot) != 64 or not snapshot.isalnum():
            raise damaged(f"{self.place.root}, ref '{ref}',", ascii(snapshot)[:100])
        return Head(snapshot, fetched.etag)

    def entries(self, snapshot: str, kept: Path | None) -> Entries:
        """The entries of all pages."""
        where = f"{self.place.root}@{snapshot[:12]}"
        entries: Entries = {}
        for data in each(lambda page: self._kept(page.sha256, page.size, kept), self._pages(snapshot, kept)):
            entries |= parse_entries(self._parsed(data).get("entries"), where)
        check_whole(entries, where)
        return entries

    def objects_of(self, snapshot: str) -> set[str]:
        """The sha256 of each object that a snapshot needs: its index, the pages of that, and files."""
        files = (record for files in self.entries(snapshot, None).values() for record in files.values())
        return {snapshot, *(record.sha256 for record in (*self._pages(snapshot, None), *files))}

    def _pages(self, snapshot: str, kept: Path | None) -> list[FileRecord]:
        where = f"{self.place.root}@{snapshot[:12]}"
        pages = self._parsed(self._kept(snapshot, None, kept)).get("pages")
        if not isinstance(pages, Mapping):
            raise damaged(where, "no pages")
        return [parse_record(page, where) for page in pages.values()]

    def read(self, snapshot: str, path: str, record: FileRecord, start: int, length: int) -> bytes:
        """A part of an object."""
        try:
            return self._retried(lambda: self._store.read(f"objects/{record.sha256}", start, length))
        except AbsentError:
            raise LibraryError(
                f"{self.place.root} must hold all that its index names",
                found=f"no object {record.sha256} ({path} of snapshot {snapshot[:12]})",
                remedy="push the library again from where it is whole",
            ) from None

    def publish(self, push: Push, head: Head | None) -> str:
        """Put the files that are missing, then the index, then move the ref."""
        present = {record for files in push.present.values() for record in files.values()}
        wanted = {record for files in push.entries.values() for record in files.values()}
        missing = sorted(wanted - present)
        there = self._there(missing)

        def put(record: FileRecord) -> None:
            if record.sha256 not in there:
                self._create(f"objects/{record.sha256}", push.read(record))

        for _ in each(put, missing):
            push.advance()
        index = self._put_index(push.entries, push.present)
        if head is not None and head.snapshot == index:
            return index
        data = encode({"format_version": FORMAT_VERSION, "snapshot": index})
        if head is None:
            if not self._create(f"refs/{MAIN}", data):
                raise StaleError
        else:
            self._replace(f"refs/{MAIN}", data, head.etag)
        return index

    def name(self, ref: str, snapshot: str) -> None:
        """A ref is created and never replaced."""
        data = encode({"format_version": FORMAT_VERSION, "snapshot": snapshot})
        if not self._create(f"refs/{ref}", data) and (head := self.head(ref)) and head.snapshot != snapshot:
            raise StaleError

    def _there(self, records: list[FileRecord]) -> set[str]:
        """Which of these objects are there, of their size: an earlier push may have broken off."""
        if len(records) > MOST_ASKED:
            listed = self._retried(lambda: self._store.list("objects/"))
            return {record.sha256 for record in records if listed.get(f"objects/{record.sha256}") == record.size}
        sizes = each(lambda record: self._retried(lambda: self._store.size(f"objects/{record.sha256}")), records)
        return {record.sha256 for record, size in zip(records, sizes, strict=True) if size == record.size}

    def _put_index(self, entries: Entries, present: Entries) -> str:
        pages = _pages(entries)
        new = sorted({*pages.values()} - {*_pages(present).values()})
        for _ in each(lambda data: self._create(f"objects/{record(data).sha256}", data), new):
            pass
        records = {prefix: record(data) for prefix, data in pages.items()}
        index = encode({"format_version": FORMAT_VERSION, "pages": records})
        digest = record(index).sha256
        self._create(f"objects/{digest}", index)
        return digest

    def _kept(self, digest: str, size: int | None, kept: Path | None) -> bytes:
        """An object of the index, held to its hash, from here or from there."""
        path = None if kept is None else kept / digest
        if path is not None:
            with suppress(OSError):
                if record(data := read_regular(path, follow_links=False)).sha256 == digest:
                    return data
        try:
            data = self._retried(lambda: self._store.get(f"objects/{digest}")).data
        except AbsentError:
            raise damaged(f"{self.place.root}@{digest[:12]}", "no object of that digest") from None
        if record(data).sha256 != digest or size not in (None, len(data)):
            raise damaged(f"{self.place.root}@{digest[:12]}", f"an object of sha256 {record(data).sha256}")
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f"{digest}.new")
            aside.write_bytes(data)
            aside.replace(path)
        return data

    def _create(self, key: str, data: bytes) -> bool:
        return self._retried(lambda: self._store.create(key, data))

    def _replace(self, key: str, data: bytes, etag: str) -> None:
        try:
            self._retried(lambda: self._store.replace(key, data, etag))
        except StaleError:
            # A request that was repeated may have done its work the first time.
            if self._store.get(key).data != data:
                raise

    def _retried(self, action: Any) -> Any:
        return retried(action, self.place.root)

    def _parsed(self, data: bytes) -> dict[str, Any]:
        try:
            document = parse_json(data)
        except ValueError as error:
            raise damaged(self.place.root, error) from error
        if not isinstance(document, dict):
            raise damaged(self.place.root, f"a {type(document).__name__}")
        version = document.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise LibraryError(
                f"{self.place.root} must have an index this Lorary reads, of version {FORMAT_VERSION}",
                found=f"version {version!a}",
                remedy="pip install --upgrade lorary",
            )
        return document


def _pages(entries: Entries) -> dict[str, bytes]:
    """The pages of an index by the first digits of the sha256 of the names in it."""
    digits = 0
    while len(entries) > PAGE_ENTRIES * 16**digits:
        digits += 1
    pages: dict[str, Entries] = defaultdict(dict)
    for entry, files in entries.items():
        pages[hashlib.sha256(entry.encode()).hexdigest()[:digits]][entry] = files
    return {prefix: encode({"entries": page}) for prefix, page in pages.items()}
