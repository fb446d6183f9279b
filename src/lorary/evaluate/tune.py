"""Choosing a library's default router by its experts' own rows: with the task's expert there, and without it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lorary.data.schema import Row, Task
from lorary.display import Display
from lorary.errors import TaskError, UsageError
from lorary.evaluate.base_template import choose_templates, count_templates
from lorary.evaluate.cells import BASE
from lorary.evaluate.evaluation import ScoredCells
from lorary.evaluate.scorer import Scorer
from lorary.evaluate.seated_base import SeatedBase, known_base
from lorary.evaluate.settings import EvaluateSettings
from lorary.library.derived import save_derived
from lorary.library.files import encode_json
from lorary.library.prepared import group_key
from lorary.library.store import Library
from lorary.model.base import Base
from lorary.route.spec import REFERENCES

# What is tried where nobody says: one expert or the base, one expert or all, a few experts, and what needs no decision
# for the request.
CANDIDATES = ("auto", "auto[fallback=uniform]", "auto[top_k=3]", "arrow", "uniform")


@dataclass(frozen=True)
class TriedRouter:
    """How one router did.

    Args:
        router: as it is written.
        known: mean score over tasks, all experts there.
        masked: mean score over tasks, each without the experts that were trained on it.
    """

    router: str
    known: float
    masked: float

    @property
    def mean(self) -> float:
        """What candidates are chosen by: known and unknown requests count alike."""
        return (self.known + self.masked) / 2


@dataclass(frozen=True)
class Tuned:
    """What was chosen, and why.

    Args:
        library: its folder.
        router: the setting that is the library's default now.
        candidates: all that were tried, the best first.
        tasks: on which tasks.
        rows: rows of each, at most; validation rows, or training rows where there are none.
    """

    library: str
    router: Mapping[str, Any]
    candidates: list[TriedRouter]
    tasks: list[str]
    rows: int


def tune_library(
    base: Base,
    library: Library,
    tasks: Mapping[str, Task],
    settings: EvaluateSettings,
    *,
    force_base: bool = False,
    display: Display | None = None,
) -> Tuned:
    """Try routers on the experts' own validation rows, and make the best one the library's default.

    Each task is scored twice: with all experts, as a request of a known kind, and without the experts that were
    trained on it, as a request that no expert was trained for. No test row is looked at.

    Args:
        base: the bare base model.
        library: its experts' tasks are recorded.
        tasks: by name; those of other experts are left out.
        settings: how to evaluate; `routers` are the candidates, `rows` those of a task.
        force_base: accept unrelated weights of the same shapes.
        display: where progress is shown.

    Returns:
        What was chosen, and how every candidate did.

    Raises:
        TaskError: if no expert's task is among `tasks` with validation or training rows, or a candidate failed.
        UsageError: if a candidate is no router, such as the oracle.
    """
    if references := [router for router in settings.routers if router in REFERENCES]:
        raise UsageError(
            "candidates for a default must be routers, which are told nothing of the task", found=references[0]
        )
    names = library.names()
    experts_of, views = masked_views(library, tasks, settings.rows)
    if BASE in settings.routers:
        views = {name: _with_other_rows(view, tasks[name]) for name, view in views.items()}
    seated, scored = SeatedBase(known_base(base), library, force_base=force_base), (ScoredCells(), ScoredCells())
    with seated, (display or Display()).bar("tuning", len(views) * len(settings.routers)) as bar:
        for name, view in views.items():
            others = [expert for expert in names if expert not in experts_of[name]]
            masked = replace(settings, route={**settings.route, "allow": others})
            for router in settings.routers:
                for how, cells in zip((settings, masked), scored, strict=True):
                    failure = Scorer(seated, library.path.name, how, []).score(view, router, cells)
                    if failure is not None:
                        raise TaskError(
                            f"candidate {router} must run on task '{name}': {failure.rule}", found=failure.found,
                            remedy=failure.remedy or "leave it out of --routers",
                        )  # fmt: skip
                bar.advance(f"{name} {router}")
    means = [_means(cells, settings.routers) for cells in scored]
    candidates = [TriedRouter(router, means[0][router], means[1][router]) for router in settings.routers]
    candidates.sort(key=lambda candidate: -candidate.mean)  # stable: of equal ones the first that was named
    best = settings.setting(candidates[0].router).to_json()
    default = {key: value for key, value in best.items() if value is not None}
    tuned = Tuned(str(library.path), default, candidates, list(views), settings.rows)
    save_derived(library.path, "tuned", group_key(library, names), {"tuned.json": encode_json(asdict(tuned))})
    library.set_default_router(default)
    return tuned


def masked_views(
    library: Library, tasks: Mapping[str, Task], num_rows: int
) -> tuple[dict[str, list[str]], dict[str, Task]]:
    """The tasks whose experts can be taken away while others are left.

    Args:
        library: its experts' tasks are recorded.
        tasks: by name; those of no expert are left out, and those of all experts.
        num_rows: rows of each, at most.

    Returns:
        The experts of each task; and the tasks, with validation rows (training rows where there are none) in the place
        of test rows.

    Raises:
        TaskError: if there is no such task.
    """
    experts_of: dict[str, list[str]] = {}
    for row in library.describe():
        for task in row["tasks"]:
            experts_of.setdefault(task, []).append(row["name"])
    num_experts = len(library.names())
    views = {
        name: replace(task, rows={"test": rows})
        for name, task in tasks.items()
        if 0 < len(experts_of.get(name, ())) < num_experts and (rows := _rows(task, num_rows))
    }
    if not views:
        raise TaskError(
            f"tasks of experts of '{library.path}' must be given, with validation or training rows",
            found=f"none among {sorted(tasks)[:5]} that some experts were trained on and others were not",
            remedy="--tasks with the tasks of the build",
        )
    return experts_of, views


def _with_other_rows(view: Task, task: Task) -> Task:
    """A task with the training rows that are not scored: on these the base's template is chosen."""
    scored = set(map(id, view.split("test")))
    return replace(
        view, rows={**view.rows, "train": tuple(row for row in task.split("train") if id(row) not in scored)}
    )


def _rows(task: Task, number: int) -> tuple[Row, ...]:
    return (task.split("val") or task.split("train"))[:number]


def _means(scored: ScoredCells, routers: Sequence[str]) -> dict[str, float]:
    """Mean over tasks of the score that counts, by router."""
    values: dict[str, list[float]] = {router: [] for router in routers}
    for cell in count_templates(scored.cells, choose_templates(scored.base_templates)):
        if cell.primary and cell.router in values:
            values[cell.router].append(cell.value)
    return {router: sum(own) / len(own) for router, own in values.items()}
