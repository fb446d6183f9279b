"""Adapters of a library while it is served: listed, added, replaced and removed."""

import asyncio
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.datastructures import UploadFile

from lorary.errors import LibraryError, LoraryError, did_you_mean
from lorary.formats.peft_reasons import CONFIG_FILE, WEIGHTS_FILE
from lorary.library.clusters import stored_clusters
from lorary.library.folders import check_name
from lorary.library.listing import list_library
from lorary.library.store import Library
from lorary.serve.api_error import ApiError
from lorary.serve.server import Server

PATH = "/v1/adapters"
FILES = {"config": CONFIG_FILE, "weights": WEIGHTS_FILE}
_CHUNK = 1 << 20


def listed(server: Server) -> list[dict[str, Any]]:
    """The adapters that are served, read from their provenance."""
    adapters, _ = list_library(server.library.path)
    clusters = _clusters(server.library)
    served = set(server.engine.experts)
    return [
        {
            "name": adapter["name"],
            "rank": adapter["rank"],
            "targets": adapter["targets"],
            "tasks": list(adapter["tasks"]),
            "size": adapter["num_parameters"],
            "content_hash": adapter["hash"],
            "cluster": clusters.get(adapter["name"]),
        }
        for adapter in adapters
        if adapter["name"] in served
    ]


def _clusters(library: Library) -> dict[str, int]:
    """Cluster of each adapter, where these were computed for the adapters of now."""
    try:
        stored = stored_clusters(library)
    except LibraryError:  # `lorary library verify` says what is damaged
        return {}
    return {} if stored is None else stored.labels


async def put(server: Server, name: str, files: Mapping[str, UploadFile], tasks: list[str], *, is_new: bool) -> None:
    """Take an adapter into the library through all of its checks, and seat it.

    Args:
        server: whose library it is.
        name: of the adapter.
        files: its configuration and its weights.
        tasks: that it was trained on.
        is_new: whether the name must be free; else it must be taken.

    Raises:
        LoraryError: as for `Library.add` and `Library.replace`, or if it cannot be seated; the library then holds what
            it held before.
    """
    check_name(name)
    async with server.change:
        if not is_new and name not in server.engine.experts:
            raise _missing(server, name)
        with tempfile.TemporaryDirectory(prefix="lorary-upload-") as place:
            # The folder's name is not the client's, and neither are those of the files.
            folder = Path(place) / "adapter"
            folder.mkdir()
            for kind, upload in files.items():
                await asyncio.to_thread(_copy, upload, folder / FILES[kind])
            old = None if is_new else await asyncio.to_thread(_kept, server, name, Path(place) / name)
            take = server.library.add if is_new else server.library.replace
            await asyncio.to_thread(take, folder, name, tasks=tasks or None)
            try:
                await server.engine.seat(name)
            except BaseException:
                await asyncio.to_thread(_undo, server, name, old)
                raise
        await server.look_again()


async def remove(server: Server, name: str) -> None:
    """Take an adapter out of the model and out of the library.

    Raises:
        LoraryError: if there is none of that name, or it must stay.
    """
    check_name(name)
    async with server.change:
        if name not in server.engine.experts:
            raise _missing(server, name)
        if len(server.engine.experts) == 1:
            raise ApiError(409, "a library that is served must keep an adapter", found=f"'{name}' is the last one")
        await server.engine.unseat(name)
        try:
            await asyncio.to_thread(server.library.remove, name)
        except LoraryError:
            if name in server.library:
                await server.engine.seat(name)
            raise
        await server.look_again()


def _missing(server: Server, name: str) -> ApiError:
    names = server.engine.experts
    remedy = did_you_mean(name, names, remedy=f"GET {PATH} lists all {len(names)}")
    return ApiError(404, "the adapter must be one of those that are served", found=f"'{name}'", remedy=remedy)


def _copy(upload: UploadFile, path: Path) -> None:
    with open(path, "xb") as file:
        while chunk := upload.file.read(_CHUNK):
            file.write(chunk)


def _kept(server: Server, name: str, folder: Path) -> Path:
    """A copy of an adapter of the library, in case its successor cannot be seated."""
    folder.mkdir()
    source = server.library[name].folder
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def _undo(server: Server, name: str, old: Path | None) -> None:
    if old is None:
        server.library.remove(name)
    else:
        server.library.replace(old, name)
