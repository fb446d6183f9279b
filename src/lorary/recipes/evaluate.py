"""`lorary evaluate`: libraries under several routers on held-in and held-out tasks, beside the base model alone."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorary.data.tasks import Task, load_tasks
from lorary.display import Display
from lorary.errors import LibraryError, TaskError, UsageError
from lorary.evaluate.cells import BASE, Failure
from lorary.evaluate.evaluation import Evaluation, Found, combine, evaluation_of
from lorary.evaluate.metrics import check_metric
from lorary.evaluate.programs import leave_out_code
from lorary.evaluate.sandbox import make_sandbox
from lorary.evaluate.scorer import Scorer
from lorary.evaluate.seated_base import Bench, KnownBase, at_bench, known, known_unloaded
from lorary.evaluate.settings import EvaluateSettings
from lorary.library.opening import base_of, template_of
from lorary.library.store import Library
from lorary.model.attach import Routing
from lorary.model.base import Base
from lorary.route.presets import in_units, without_router

__all__ = ["EvaluateSettings", "Evaluation", "combine", "evaluate_libraries", "evaluate_library", "run_evaluate"]


def evaluate_library(
    base: Base,
    library: Library,
    tasks: Mapping[str, Task],
    settings: EvaluateSettings,
    *,
    force_base: bool = False,
    display: Display | None = None,
) -> Evaluation:
    """Score every router on every task; cells that were scored before are read from the library's results.

    The base model is scored twice, in the template of the experts and under its own chat template, and the better of
    the two is what every router is compared with: a bare prompt puts a chat model at a disadvantage that any adapter
    repairs. The oracle is the task's own expert, or for a task without one the single expert with the lowest loss on
    its validation rows (where it has none, on its training rows, else on its test rows).

    A cell that cannot be scored is a failure of the evaluation, and the others are scored all the same.

    Args:
        base: the base model; experts are seated while evaluating and gone afterwards.
        library: the library.
        tasks: tasks with test rows.
        settings: how to evaluate.
        force_base: accept unrelated weights of the same shapes.
        display: where progress is shown.

    Returns:
        The evaluation; its cells stand in the order of tasks and routers.

    Raises:
        LibraryError: if the experts were trained with another template.
        BaseModelError: if the base is not the library's.
    """
    return _evaluate(known(base), [library], tasks, settings, force_base, display)


def evaluate_libraries(
    base: Base,
    libraries: Sequence[Library],
    tasks: Mapping[str, Task],
    settings: EvaluateSettings,
    *,
    display: Display | None = None,
) -> Evaluation:
    """Evaluate several libraries over one base, one after the other; the base itself is scored once.

    Args and errors as for `evaluate_library`; every library takes the same settings.

    Args:
        base: the base model of all of them.
        libraries: at least one.
        tasks: tasks with test rows.
        settings: how to evaluate.
        display: where progress is shown.

    Returns:
        One evaluation, whose cells stand in the order of libraries, tasks and routers.

    Raises:
        UsageError: if there is no library, or one is named twice.
    """
    return _evaluate(known(base), libraries, tasks, settings, False, display)


def run_evaluate(
    library_path: str,
    tasks_reference: str,
    *,
    routers: Sequence[str],
    also: Sequence[str] = (),
    names: Sequence[str] | None = None,
    base: str | None = None,
    force_base: bool = False,
    device: str = "auto",
    dtype: str = "auto",
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
        base: the base model to load; the first library's own where None.
        force_base: accept unrelated weights of the same shapes.
        device: where to run.
        dtype: of the base.
        route: fields of `Routing`, in place of those of the first library's default router.
        changes: other fields of `EvaluateSettings`; None keeps the first library's default router and template.

    Returns:
        The evaluation.
    """
    libraries = [Library.open(path) for path in (library_path, *also)]
    for library in libraries:
        if not library.names():
            raise LibraryError(f"library '{library.path}' must hold an adapter to be evaluated", found="none")
    first = libraries[0]
    given = {key: value for key, value in changes.items() if value is not None}
    default = Routing(**first.default_router)
    asked = without_router(default) | dict(route or {})
    own = {key: asked.pop(key) for key in ("top_k", "temperature", "mix")}
    fields = {
        **own,
        "route": asked,
        "units": in_units(default),
        **given,
        "template": template_of(first, given.get("template")),
    }
    settings = EvaluateSettings(routers=tuple(routers), **fields)
    tasks = {
        name: task for name, task in load_tasks(tasks_reference, names=names).items() if names or task.split("test")
    }
    if not tasks:
        raise TaskError(f"'{tasks_reference}' must have tasks with test rows", found="none")
    for task in tasks.values():
        check_metric(task.metric, task.name)
    if not settings.allow_code:
        tasks = leave_out_code(tasks)
    at_hand = known_unloaded(base_of(first, base), dtype=dtype, device=device)
    return _evaluate(at_hand, libraries, tasks, settings, force_base, None)


def library_names(paths: Sequence[Path]) -> list[str]:
    """What to call libraries: the names of their folders, with as much of the path before them as tells them apart.

    Args:
        paths: of the libraries.

    Raises:
        UsageError: if there is none, or one twice.
    """
    parts = [path.resolve().parts for path in paths]
    if not parts or len(set(parts)) < len(parts):
        raise UsageError(
            "an evaluation must have libraries, each of them once", found=[str(path) for path in paths] or "none"
        )
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _evaluate(
    base: KnownBase, libraries: Sequence[Library], tasks: Mapping[str, Task], settings: EvaluateSettings,
    force_base: bool, display: Display | None,
) -> Evaluation:  # fmt: skip
    names = library_names([library.path for library in libraries])
    for library in libraries:
        template_of(library, settings.template)
    display, found = display or Display(), Found()
    routers = list(dict.fromkeys((BASE, *settings.routers)))
    benches = [Bench(base, library, force_base=force_base) for library in libraries]
    sandbox = make_sandbox(unsafe=settings.unsafe_code) if settings.allow_code else None
    said: set[Failure] = set()
    with display.bar("evaluating", len(benches) * len(tasks) * len(routers)) as bar:
        for name, bench in zip(names, benches, strict=True):
            scorer = Scorer(bench, name, settings, [other.cache for other in benches if other is not bench], sandbox)
            with at_bench(bench):
                for task in tasks.values():
                    for router in routers:
                        _say(scorer.score(task, router, found), display, said)
                        bar.advance(f"{task.name} {router}")
    return evaluation_of(found, settings, names, base.name)


def _say(failure: Failure | None, display: Display, said: set[Failure]) -> None:
    """Show why a cell failed; a router that cannot run over a library fails on every task, which is said once."""
    if failure is None or (kind := replace(failure, task="")) in said:
        return
    said.add(kind)
    what = f"{failure.library}, {failure.router}, {failure.task}"
    display.say(f"failed: {what}: {failure.rule}" + (f" (found: {failure.found})" if failure.found else ""))
