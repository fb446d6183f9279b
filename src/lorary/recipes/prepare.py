"""`lorary library prepare`: opens a library, its base and the data of its experts, and prepares a router."""

from collections.abc import Mapping, Sequence
from typing import Any

from lorary.data.tasks import BUILTIN, load_tasks
from lorary.errors import LibraryError, TaskError, UsageError, did_you_mean
from lorary.library.opening import base_of
from lorary.library.store import Library
from lorary.model.base import load_base
from lorary.prepare.expert_rows import ExpertRows, parse_mapping, rows_of_experts
from lorary.prepare.fallback import measure_fallback
from lorary.prepare.prepare_library import PrepareResult, prepare_library, prepare_yardstick
from lorary.prepare.settings import PrepareSettings
from lorary.recipes.base_options import BaseOptions
from lorary.route import ROUTERS


def run_prepare(
    library_path: str,
    router: str,
    *,
    tasks: str | None = None,
    columns: str | None = None,
    mapping: str | None = None,
    experts: Sequence[str] | None = None,
    load: BaseOptions | None = None,
    **changes: Any,
) -> PrepareResult:
    """Load a library, its base and the data of its experts, and prepare a router.

    Args:
        library_path: folder of the library.
        router: which router.
        tasks: as `lorary.data.tasks.load_tasks` takes it; builtin where None. Where neither these nor `mapping` are
            given, and the experts were not trained on builtin tasks, prompts that ship with the package stand in for
            those of the tasks, for a router that can do with them.
        columns: likewise.
        mapping: `NAME=TASK,...` for experts whose tasks are not known.
        experts: these alone; all where None.
        load: the base model; the library's own where None.
        changes: other fields of `PrepareSettings`.

    Returns:
        What was done.

    Raises:
        LoraryError: as for `prepare_library` and `rows_of_experts`.
    """
    load = load or BaseOptions()
    settings = PrepareSettings(router, **changes)
    library = Library.open(library_path)
    names = _chosen(library, experts)
    data = _data(library, names, tasks, columns, mapping, settings)
    loaded = load_base(base_of(library, load.base), dtype=load.dtype, device=load.device)
    if data is None:
        return prepare_yardstick(loaded, library, names, settings, force_base=load.force_base)
    result = prepare_library(loaded, library, data, settings, force_base=load.force_base)
    if ROUTERS[router].tries:
        measure_fallback(loaded, library, load_tasks(tasks or BUILTIN, columns=columns), force_base=load.force_base)
    return result


def _data(
    library: Library,
    names: Sequence[str],
    tasks: str | None,
    columns: str | None,
    mapping: str | None,
    settings: PrepareSettings,
) -> Mapping[str, ExpertRows] | None:
    """Rows of each expert; None where there are none and the router can do without."""
    try:
        mapped = parse_mapping(mapping)
        return rows_of_experts(library, names, tasks or BUILTIN, mapped, settings.num_rows, settings.seed, columns)
    except TaskError:
        if tasks is None and mapping is None and settings.data.has_yardstick:
            return None
        raise


def _chosen(library: Library, experts: Sequence[str] | None) -> list[str]:
    names = library.names()
    if not names:
        raise LibraryError(f"library '{library.path}' must hold an adapter", found="none", remedy="lorary library add")
    if unknown := sorted(set(experts or ()) - set(names)):
        remedy = did_you_mean(unknown[0], names, remedy=f"it has {names}")
        raise UsageError("--experts must name experts of the library", found=unknown[0], remedy=remedy)
    if experts is not None and not experts:
        raise UsageError("--experts must name an expert", found="none", remedy="leave it out for all of them")
    return [name for name in names if experts is None or name in experts]
