"""`lorary adapt`: opens library, base and tasks, and adapts."""

from collections.abc import Sequence

from lorary.adapt.adapt_library import AdaptResult, adapt_library, check_tasks
from lorary.adapt.settings import (
    AdaptSettings,
)
from lorary.build.settings import RunSettings
from lorary.data.tasks import load_tasks
from lorary.errors import TaskError
from lorary.library.opening import base_of, created_for
from lorary.library.store import Library
from lorary.model.base import load_base


def run_adapt(
    library_path: str,
    tasks_reference: str,
    settings: AdaptSettings,
    *,
    names: Sequence[str] | None = None,
    columns: str | None = None,
    into: str | None = None,
    base: str | None = None,
    run: RunSettings | None = None,
) -> AdaptResult:
    """Load a library, its base and tasks, and adapt.

    Args:
        library_path: folder of the library to adapt from.
        tasks_reference: as `lorary.data.tasks.load_tasks` takes it.
        settings: how.
        names: tasks to take; all that have training and validation rows where None.
        columns: as `lorary.data.tasks.load_tasks` takes it, too.
        into: folder of the library in which the results go, new or not; the library itself where None.
        base: the base model to load; the library's own where None.
        run: how to run.

    Returns:
        What was made.

    Raises:
        LoraryError: as `adapt_library`; also if library, tasks or base cannot be loaded.
    """
    run = run or RunSettings()
    library = Library.open(library_path)
    loaded = load_tasks(tasks_reference, names=names, columns=columns)
    tasks = {name: task for name, task in loaded.items() if names or (task.split("train") and task.split("val"))}
    if not tasks:
        raise TaskError(f"'{tasks_reference}' must have tasks with training and validation rows", found="none")
    check_tasks(tasks, settings)
    reference = base_of(library, base)
    model = load_base(reference, dtype=run.dtype, device=run.device)
    if into is None:
        return adapt_library(model, library, tasks, settings, run=run)
    with created_for(into, reference) as target:
        return adapt_library(model, library, tasks, settings, into=target, run=run)
