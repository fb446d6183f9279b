"""Libraries under several routers on held-in and held-out tasks, beside the base model alone."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lorary.data.schema import Task
from lorary.display import Display
from lorary.errors import UsageError
from lorary.evaluate.cells import BASE, CellFailure
from lorary.evaluate.evaluation import Evaluation, ScoredCells, evaluation_of
from lorary.evaluate.recorded_tasks import mapped_by_name
from lorary.evaluate.sandbox import make_sandbox
from lorary.evaluate.scorer import Scorer
from lorary.evaluate.seated_base import KnownBase, SeatedBase, known_base
from lorary.evaluate.settings import EvaluateSettings
from lorary.library.opening import template_of
from lorary.library.store import Library
from lorary.model.base import Base


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

    The base model is scored twice, in the template of the experts and under its own chat template: a bare prompt puts
    a chat model at a disadvantage that any adapter repairs. Routers are compared with the template that is better on
    validation rows. The oracle is the task's own expert, or for a task without one the single expert with the lowest
    loss on its validation rows (where it has none, on its training rows, else on its test rows).

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
    return evaluate_libraries(base, [library], tasks, settings, force_base=force_base, display=display)


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


def evaluate_libraries(
    base: Base | KnownBase,
    libraries: Sequence[Library],
    tasks: Mapping[str, Task],
    settings: EvaluateSettings,
    *,
    force_base: bool = False,
    display: Display | None = None,
) -> Evaluation:
    """`evaluate_library` for several libraries of one base, one after the other; the base itself is scored once.

    Raises:
        UsageError: if there is no library, or one is named twice.
    """
    base = known_base(base) if isinstance(base, Base) else base
    names = library_names([library.path for library in libraries])
    for library in libraries:
        template_of(library, settings.template)
    display = display or Display()
    scored = ScoredCells(rows={name: task.split("test")[: settings.rows] for name, task in tasks.items()})
    routers = list(dict.fromkeys((BASE, *settings.routers)))
    bases = [SeatedBase(base, library, template=settings.template, force_base=force_base) for library in libraries]
    sandbox = make_sandbox(unsafe=settings.unsafe_code) if settings.allow_code else None
    reported: set[CellFailure] = set()
    with display.bar("evaluating", len(bases) * len(tasks) * len(routers)) as bar:
        for name, seated in zip(names, bases, strict=True):
            if by_name := mapped_by_name(seated.library.describe(), tasks):
                scored.tasks_by_name[name] = by_name
            other_caches = [other.cache for other in bases if other is not seated]
            scorer = Scorer(seated, name, settings, other_caches, sandbox, tasks.values())
            with seated:
                for task in tasks.values():
                    for router in routers:
                        _say(scorer.score(task, router, scored), display, reported)
                        bar.advance(f"{task.name} {router}")
    return evaluation_of(scored, settings, names, base.name)


def _say(failure: CellFailure | None, display: Display, reported: set[CellFailure]) -> None:
    """Show why a cell failed; a router that cannot run over a library fails on every task, which is said once."""
    if failure is None or (kind := replace(failure, task="")) in reported:
        return
    reported.add(kind)
    cell = f"{failure.library}, {failure.router}, {failure.task}"
    display.say(f"failed: {cell}: {failure.rule}" + (f" (found: {failure.found})" if failure.found else ""))
