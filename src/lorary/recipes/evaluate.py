"""`lorary evaluate`: opens libraries, base and tasks, and evaluates."""

from collections.abc import Mapping, Sequence
from typing import Any

from lorary.data.tasks import load_tasks
from lorary.errors import LibraryError, TaskError
from lorary.evaluate.evaluate_library import evaluate_libraries
from lorary.evaluate.evaluation import Evaluation
from lorary.evaluate.metrics import scorable_tasks
from lorary.evaluate.seated_base import known_unloaded
from lorary.evaluate.settings import EvaluateSettings
from lorary.library.opening import base_of, template_of
from lorary.library.store import Library
from lorary.recipes.base_options import BaseOptions
from lorary.route.presets import in_units, without_router
from lorary.route.setting import Routing


def run_evaluate(
    library_path: str,
    tasks_reference: str,
    *,
    routers: Sequence[str],
    also: Sequence[str] = (),
    names: Sequence[str] | None = None,
    load: BaseOptions | None = None,
    route: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Evaluation:
    """Load libraries, their base and tasks, and evaluate.

    Args:
        library_path: folder of the library.
        tasks_reference: as `lorary.data.tasks.load_tasks` takes it.
        routers: as `lorary.route.spec` reads them.
        also: folders of further libraries over the same base.
        names: tasks to take, all with test rows where None.
        load: the base model; the first library's own where None.
        route: fields of `Routing`, in place of those of the first library's default router.
        changes: other fields of `EvaluateSettings`; None keeps the first library's default router and template.

    Returns:
        The evaluation.
    """
    load = load or BaseOptions()
    libraries = [Library.open(path) for path in (library_path, *also)]
    for library in libraries:
        if not library.names():
            raise LibraryError(f"library '{library.path}' must hold an adapter to be evaluated", found="none")
    first = libraries[0]
    overrides = {key: value for key, value in changes.items() if value is not None}
    default = Routing.of(**first.default_router)
    routing_fields = without_router(default) | dict(route or {})
    choice_fields = {key: routing_fields.pop(key) for key in ("top_k", "temperature", "mix")}
    fields = {
        **choice_fields,
        "route": routing_fields,
        "units": in_units(default),
        **overrides,
        "template": template_of(first, overrides.get("template")),
    }
    settings = EvaluateSettings(routers=tuple(routers), **fields)
    tasks = {
        name: task for name, task in load_tasks(tasks_reference, names=names).items() if names or task.split("test")
    }
    if not tasks:
        raise TaskError(f"'{tasks_reference}' must have tasks with test rows", found="none")
    tasks = scorable_tasks(tasks, allow_code=settings.allow_code)
    at_hand = known_unloaded(base_of(first, load.base), dtype=load.dtype, device=load.device)
    return evaluate_libraries(at_hand, libraries, tasks, settings, force_base=load.force_base)
