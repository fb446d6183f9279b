"""`lorary export`: a library becomes what another tool reads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorary.adapt.export_settings import TRANSFORMERS, StaticSettings
from lorary.adapt.export_static import StaticExport, export_static
from lorary.library.opening import base_of
from lorary.library.store import Library
from lorary.route.presets import merged
from lorary.route.setting import Routing
from lorary.serve.export_settings import VLLM, ExportSettings
from lorary.serve.routed_adapter import routed_adapter, write_routed_folder


@dataclass(frozen=True)
class ExportResult:
    """What an export made.

    Args:
        adapter: the folder it lies in.
        engine: that serves it.
        router: that decides in each layer for each token.
        experts: names of the adapters that went into it.
        rank: of the adapter: all ranks of the experts, and one row for the score of each.
        max_lora_rank: the smallest value of the server's --max-lora-rank that takes it.
    """

    adapter: str
    engine: str
    router: str
    experts: list[str]
    rank: int
    max_lora_rank: int


def run_static_export(
    library_path: str, out: str, *, engine: str, base: str | None = None, **fields: Any
) -> StaticExport:
    """Export adapters of a library without a router: for peft, transformers or llama.cpp.

    Args:
        library_path: folder of the library.
        out: folder or file of the result, which must not exist.
        engine: one of `STATIC`.
        base: the base model, for transformers; the library's own where None.
        fields: of `StaticSettings`.

    Returns:
        Where it lies, and how near the merged model comes to the routed one.

    Raises:
        UsageError: if an option makes no sense, or something is in the result's place.
        LibraryError: if there is no such adapter, or the result cannot be written.
        AdapterError: if the adapter cannot be exported so.
        BaseModelError: if the base cannot be loaded.
    """
    settings, library = StaticSettings(**fields), Library.open(library_path)
    reference = base_of(library, base) if engine == TRANSFORMERS else ""
    return export_static(library, Path(out), engine, settings, reference)


def run_export(library_path: str, out: str, *, engine: str = VLLM, **route: Any) -> ExportResult:
    """Write a library as one routed adapter, into a folder of `out` whose name holds the hash of its content.

    Args:
        library_path: folder of the library.
        out: folder in which it is made.
        engine: a server that there is an export for.
        route: router, preset and fields of a routing setting; the library's own where they are not given.

    Returns:
        Where it lies, and what the server must be started with.

    Raises:
        UsageError: if an option does not exist or is out of range, or something is in the folder's place.
        RouterError: if the server cannot route so.
        LibraryError: if the library holds no adapter, or the folder cannot be written.
        AdapterError: if the server does not take what an adapter adapts, or that many ranks.
    """
    settings, library = ExportSettings(engine), Library.open(library_path)
    routed = routed_adapter(library, merged(Routing.of(**library.default_router), route))
    folder = write_routed_folder(Path(out), routed)
    layout = routed.layout
    return ExportResult(
        str(folder), settings.engine, layout.router, list(layout.experts), layout.num_columns, routed.max_lora_rank
    )
