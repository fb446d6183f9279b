"""Adapters of the Hugging Face Hub, to be added to a library: one, those of a repository, a collection or a user.

    hf://USER/NAME[/FOLDER][@REVISION]     one adapter, or those in the folders below
    hf://collections/USER/SLUG             those of the models in a collection
    hf://USER                              those models of a user that name the library's base

A revision is pinned to its commit before anything is downloaded.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lorary.errors import AdapterError, LibraryError, LoraryError, UsageError
from lorary.formats.base import EMBEDDED, EMBEDDED_HUB_ID
from lorary.formats.peft_reasons import CONFIG_FILE, WEIGHTS_FILE, reason_of_names
from lorary.library.layout import PROVENANCE_FILE
from lorary.remote.hub_asking import TIMEOUT_S, Hub, without_bars
from lorary.remote.store import AbsentError

SCHEME = "hf://"
EXAMPLES = "for example hf://USER/NAME, hf://USER/NAME/FOLDER@REVISION, hf://collections/USER/SLUG or hf://USER"
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")


@dataclass(frozen=True)
class HubAdapter:
    """One adapter of the Hub.

    Args:
        repo: `USER/NAME`.
        folder: in the repository; empty for its root.
        commit: of the repository, 40 hexadecimal digits.
        files: names of the files in the folder that are of use.
    """

    repo: str
    folder: str
    commit: str
    files: tuple[str, ...]

    @property
    def url(self) -> str:
        """What it is recorded as."""
        return f"{SCHEME}{'/'.join(part for part in (self.repo, self.folder) if part)}@{self.commit}"

    @property
    def name(self) -> str:
        """That of its folder, or of its repository."""
        return (self.folder or self.repo).rpartition("/")[2]

    def fetch(self) -> Path:
        """Download its files into the Hub's cache, where they are not there already; the folder that holds them.

        Raises:
            AdapterError: if its weights are there only as a pickle, or not at all.
            LibraryError: if the Hub refuses, or does not answer.
        """
        if missing := {CONFIG_FILE, WEIGHTS_FILE} - {*self.files}:
            reason = reason_of_names(self.files)
            raise AdapterError(
                f"adapter '{self.name}' must be a folder with {CONFIG_FILE} and {WEIGHTS_FILE}",
                found=reason.found if reason else f"no {sorted(missing)[0]} at {self.url}",
                remedy=reason.remedy if reason else "check the URL",
            )
        hub = Hub(f"{SCHEME}{self.repo}")
        place = Path()
        for file in (CONFIG_FILE, WEIGHTS_FILE, *({PROVENANCE_FILE} & {*self.files})):
            path = f"{self.folder}/{file}" if self.folder else file
            fetch = partial(hub.api.hf_hub_download, self.repo, path, revision=self.commit)
            with without_bars():
                place = Path(_there(hub, fetch))
        return place.parent


def hub_adapters(url: str, base: str) -> Iterator[tuple[str, HubAdapter | LoraryError]]:
    """What a URL of the Hub stands for, with what errors call it: adapters, and why others are none.

    Args:
        url: as the head of this file says.
        base: name of the library's base, for the adapters of a user.

    Raises:
        UsageError: if the URL is none of these.
        LibraryError: if there is no such collection, user or base on the Hub, or the Hub does not answer.
    """
    repos, folder, revision = _parsed(url, base)
    for repo in repos:
        where = f"{SCHEME}{repo}" if len(repos) > 1 else url
        try:
            adapters = _adapters_of(repo, folder, revision)
        except LoraryError as error:
            yield where, error
            continue
        for adapter in adapters:
            yield adapter.url, adapter


def _parsed(url: str, base: str) -> tuple[Sequence[str], str, str | None]:
    """Repositories, the folder in each, and the revision."""
    path, at, revision = url.removeprefix(SCHEME).partition("@")
    parts = path.strip("/").split("/")
    is_collection = parts[0] == "collections"
    if not all(_PART.fullmatch(part) for part in parts) or (at and not _REVISION.fullmatch(revision)):
        raise UsageError(
            "adapters of the Hub must be named by a URL of theirs", found=ascii(url)[:200], remedy=EXAMPLES
        )
    if is_collection and len(parts) != 3:
        raise UsageError("a collection of the Hub must be hf://collections/USER/SLUG", found=url[:200])
    if at and (is_collection or len(parts) == 1):
        raise UsageError("a revision belongs to one repository", found=url[:200], remedy=EXAMPLES)
    if is_collection:
        return _of_collection("/".join(parts[1:])), "", None
    if len(parts) == 1:
        return _of_user(parts[0], base), "", None
    return ["/".join(parts[:2])], "/".join(parts[2:]), revision or None


def _of_collection(slug: str) -> list[str]:
    hub = Hub(f"{SCHEME}collections/{slug}")
    items = _there(hub, lambda: hub.api.get_collection(slug)).items
    repos = [str(item.item_id) for item in items if item.item_type == "model"]
    if not repos:
        raise LibraryError(f"{hub.where} must hold models", found=f"{len(items)} items, none of them a model")
    return repos


def _of_user(user: str, base: str) -> list[str]:
    hub = Hub(f"{SCHEME}{user}")
    base_id = EMBEDDED_HUB_ID if base == EMBEDDED else base
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", base_id, re.ASCII):
        raise UsageError(
            "the library's base model must have a Hub id, for the adapters of a user to be found by it",
            found=ascii(base)[:200],
            remedy="name the adapters: hf://USER/NAME, or a collection of them",
        )
    models = _there(hub, lambda: list(hub.api.list_models(author=user, filter=f"base_model:adapter:{base_id}")))
    if not models:
        raise LibraryError(
            f"{hub.where} must have adapters that name the base model {base_id}",
            found="none",
            remedy="check the user's name, or name the adapters: hf://USER/NAME",
        )
    return sorted(str(model.id) for model in models)


def _adapters_of(repo: str, folder: str, revision: str | None) -> list[HubAdapter]:
    """The adapters of a repository at one commit: that in the folder, else those below it."""
    hub = Hub(f"{SCHEME}{repo}" + (f"@{revision}" if revision else ""))
    info = _there(hub, lambda: hub.api.model_info(repo, revision=revision, timeout=TIMEOUT_S))
    prefix = f"{folder}/" if folder else ""
    paths = [str(file.rfilename) for file in info.siblings or () if str(file.rfilename).startswith(prefix)]
    places = {path.rpartition("/")[0] for path in paths if path.rpartition("/")[2] == CONFIG_FILE}
    # One without a configuration is still what was asked for: whoever fetches it says what it is instead.
    chosen = [folder] if folder in places or not places else sorted(places)
    return [
        HubAdapter(repo, place, str(info.sha), tuple(path.rpartition("/")[2] for path in paths if _is_in(path, place)))
        for place in chosen
    ]


def _is_in(path: str, folder: str) -> bool:
    return path.rpartition("/")[0] == folder


def _there(hub: Hub, action: Callable[[], Any]) -> Any:
    try:
        return hub.asked(action)
    except AbsentError:
        raise LibraryError(
            f"{hub.where} must be on the Hub",
            found="nothing that you may see",
            remedy="check the name and the revision, or log in (hf auth login, or HF_TOKEN)",
        ) from None
