"""`lorary evaluate` and `lorary.evaluate`: opens libraries, base and tasks, and evaluates."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorary.errors import LibraryError
from lorary.evaluate.evaluate_library import evaluate_libraries
from lorary.evaluate.evaluation import Evaluation
from lorary.evaluate.metrics import scorable_tasks
from lorary.evaluate.settings import EvaluateSettings
from lorary.flags import OptionValues
from lorary.keywords import with_settings
from lorary.library.opening import template_of
from lorary.library.store import Library
from lorary.model.base import Base
from lorary.recipes.base_options import BaseOptions
from lorary.recipes.inputs import TaskSource, library_of, listed, tasks_with_rows, unloaded_base
from lorary.route.presets import in_units, without_router
from lorary.route.setting import FIELDS, Routing
from lorary.route.spec import split_specs


@with_settings(EvaluateSettings, BaseOptions, omit=("base", "route", "units", *FIELDS), also=(*FIELDS, "preset"))
def evaluate(
    library: Library | str | Path,
    tasks: TaskSource,
    *,
    base: Base | str | Path | None = None,
    names: str | Iterable[str] | None = None,
    columns: str | None = None,
    also: Iterable[Library | str | Path] = (),
    options: OptionValues,
    route: Mapping[str, Any],
) -> Evaluation:
    """Score routers of a library on tasks, beside the base model; finished cells are not computed again.

    Args:
        library: the library, or the path of its folder.
        tasks: a reference such as `builtin` or a path, tasks, or a list of these.
        base: the base model, loaded or by reference; the library's own where None. A loaded one is left as it was.
        names: tasks to take, all with test rows where None.
        columns: as `lorary.data.tasks.load_tasks` takes it.
        also: further libraries over the same base, or their paths.
        options: the settings.
        route: fields of a routing setting such as `top_k=2`, in place of those of the first library's default router.

    Returns:
        The evaluation. It shows its means as a table; `failures` are the cells that could not be scored.

    Raises:
        UsageError: if an argument does not exist or is out of range.
        LibraryError: if a library holds no adapter, or its experts were trained with another template.
        TaskError: if no task has test rows.
        BaseModelError: if the base is not the library's.
    """
    load = BaseOptions(**options[BaseOptions])
    libraries = [library_of(source) for source in (library, *also)]
    for opened in libraries:
        if not opened.names():
            raise LibraryError(f"library '{opened.path}' must hold an adapter to be evaluated", found="none")
    settings = _settings(libraries[0], options[EvaluateSettings], route)
    by_name = scorable_tasks(tasks_with_rows(tasks, listed(names), columns), allow_code=settings.allow_code)
    at_hand = unloaded_base(libraries[0], base, load)
    return evaluate_libraries(at_hand, libraries, by_name, settings, force_base=load.force_base)


def _settings(first: Library, options: Mapping[str, Any], route: Mapping[str, Any]) -> EvaluateSettings:
    """What was options, with the first library's default router and template where it was not."""
    default = Routing.of(**first.default_router)
    routed = without_router(default) | dict(route)
    shared = {str(key): routed.pop(key) for key in ("top_k", "temperature", "mix") if key in routed}
    routers = options.get("routers", EvaluateSettings.routers)
    changes = {
        "template": template_of(first, options.get("template")),
        "routers": tuple(split_specs(routers) if isinstance(routers, str) else routers),
    }
    return EvaluateSettings(**{**options, **changes}, **shared, route=routed, units=in_units(default))
