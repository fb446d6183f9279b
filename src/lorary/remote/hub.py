"""A remote on the Hugging Face Hub: a model repository that holds the library as it lies on disk.

    library.json, adapters/NAME/..., derived/KIND-HASH/...    as in the library's folder, so that PEFT reads an adapter
    lorary.json                                               the index: each file with its sha256 and size
    README.md                                                 the model card

A snapshot is a commit. A push is one commit upon the one that was read, or none at all.
"""

from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from lorary.errors import LibraryError
from lorary.reading import MAX_DOCUMENT_BYTES, parse_json
from lorary.remote.card import MARK
from lorary.remote.entries import Entries, FileRecord, check_whole, damaged, encode, parse_entries, path_of
from lorary.remote.hub_asking import TIMEOUT_S, Hub, without_bars
from lorary.remote.place import MAIN, Place
from lorary.remote.remotes import Head, Push
from lorary.remote.store import AbsentError, StaleError, Traffic, TransientError, check_size
from lorary.version import __version__

INDEX, CARD = "lorary.json", "README.md"
FORMAT_VERSION = 1
# Files whose contents are in memory at a time; the Hub takes large ones before the commit.
BATCH = 32


class HubRemote:
    """A library in a model repository.

    Args:
        place: `hf://user/name` and a revision.
    """

    def __init__(self, place: Place) -> None:
        self.place, self.traffic = place, Traffic()
        self._repo = place.root.removeprefix("hf://")
        self._hub = Hub(place.root)
        self._api, self._asked = self._hub.api, self._hub.asked

    def head(self, ref: str) -> Head | None:
        """The commit of a branch, a tag, or a commit."""
        try:
            commit = str(self._asked(lambda: self._api.model_info(self._repo, revision=ref, timeout=TIMEOUT_S)).sha)
        except AbsentError:
            return None
        return Head(commit, commit)

    def entries(self, snapshot: str, kept: Path | None) -> Entries:
        """What the index of a commit says; nothing where there is none, as in a new repository."""
        where = f"{self.place.root}@{snapshot[:12]}"
        try:
            data = self._asked(lambda: self._range(INDEX, snapshot, (0, MAX_DOCUMENT_BYTES + 1)))
        except AbsentError:
            return {}
        check_size(len(data), INDEX, where)
        try:
            document = parse_json(data)
        except ValueError as error:
            raise damaged(where, error) from error
        if not isinstance(document, dict) or document.get("format_version") != FORMAT_VERSION:
            raise damaged(where, f"an index that is not of version {FORMAT_VERSION}")
        entries = parse_entries(document.get("entries"), where)
        check_whole(entries, where)
        return entries

    def read(self, snapshot: str, path: str, record: FileRecord, start: int, length: int) -> bytes:
        """A range of a file at a commit."""
        try:
            return self._asked(lambda: self._range(path, snapshot, (start, length)))
        except AbsentError:
            raise LibraryError(
                f"{self.place.root} must hold all that its index names",
                found=f"no {path} at commit {snapshot[:12]}",
                remedy="push the library again from where it is whole",
            ) from None

    def publish(self, push: Push, head: Head | None) -> str:
        """Send the files ahead, then make one commit of all that changed."""
        if head is not None and push.entries == push.present:
            return head.snapshot
        parent = self._created(is_public=push.is_public) if head is None else head.snapshot
        new, old = _by_path(push.entries), _by_path(push.present)
        changed = [path for path in sorted(new) if old.get(path) != new[path]]
        operations: list[Any] = []
        for start in range(0, len(changed), BATCH):
            batch = [CommitOperationAdd(path, push.read(new[path])) for path in changed[start : start + BATCH]]
            with without_bars():
                self._asked(partial(self._api.preupload_lfs_files, self._repo, batch))
            for operation in batch:
                self.traffic.add(sent=new[operation.path_in_repo].size)
                push.advance()
            operations.extend(batch)
        operations.extend(CommitOperationDelete(path) for path in sorted(set(old) - set(new)))
        index = encode({"format_version": FORMAT_VERSION, "entries": push.entries})
        operations.append(CommitOperationAdd(INDEX, index))
        if (card := push.card()) and self._is_card_ours(parent):
            operations.append(CommitOperationAdd(CARD, card))
        try:
            with self._hub.reported(), without_bars():
                commit = self._api.create_commit(
                    self._repo, operations, commit_message=push.message, revision=MAIN, parent_commit=parent
                )
        except TransientError:
            # It may have been made: whoever reads again will see.
            raise StaleError from None
        self.traffic.add(sent=len(index) + len(card))
        return str(commit.oid)

    def name(self, ref: str, snapshot: str) -> None:
        """A tag."""
        try:
            self._asked(lambda: self._api.create_tag(self._repo, tag=ref, revision=snapshot))
        except StaleError:
            if (head := self.head(ref)) is None or head.snapshot != snapshot:
                raise

    def _is_card_ours(self, revision: str) -> bool:
        try:
            return MARK.encode() in self._asked(lambda: self._range(CARD, revision, None))
        except AbsentError:
            return True

    def _created(self, *, is_public: bool) -> str:
        """The first commit of a new repository."""
        self._asked(lambda: self._api.create_repo(self._repo, private=not is_public, exist_ok=True))
        head = self.head(MAIN)
        if head is None:
            raise LibraryError(f"{self.place.root} must be there once it is made", found="no branch main")
        return head.snapshot

    def _range(self, path: str, revision: str, span: tuple[int, int] | None) -> bytes:
        headers = dict(build_hf_headers(library_name="lorary", library_version=__version__))
        if span is not None:
            headers["Range"] = f"bytes={span[0]}-{span[0] + span[1] - 1}"
        url = hf_hub_url(self._repo, path, revision=revision, endpoint=self._api.endpoint)
        response = get_session().get(url, headers=headers, timeout=TIMEOUT_S, follow_redirects=True)
        hf_raise_for_status(response)
        data = bytes(response.content)
        self.traffic.add(received=len(data))
        # A server may leave the range out, and send the whole file.
        return data if span is None or response.status_code == 206 else data[span[0] : span[0] + span[1]]


def _by_path(entries: Entries) -> dict[str, FileRecord]:
    return {path_of(entry, file): record for entry, files in entries.items() for file, record in files.items()}
