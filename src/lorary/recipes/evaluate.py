"""`lorary evaluate`: a library under several routers on held-in and held-out tasks, beside the base model alone."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lorary.data.tasks import Task, load_tasks
from lorary.data.template import Template, make_template
from lorary.errors import LibraryError, RouterError, TaskError, UsageError
from lorary.evaluate.answers import score_rows
from lorary.evaluate.cache import ResultCache
from lorary.evaluate.cells import Cell, Comparison, base_guard, compare
from lorary.evaluate.loglik import answer_losses
from lorary.evaluate.metrics import check_metric
from lorary.evaluate.metrics.perplexity import perplexity
from lorary.evaluate.programs import leave_out_code
from lorary.evaluate.sandbox import Sandbox, make_sandbox
from lorary.evaluate.statistics import bootstrap_interval
from lorary.library.fingerprint import fingerprint_of_model
from lorary.library.store import Library
from lorary.model.attach import Routing, attach, detach, routing
from lorary.model.base import Base, load_base
from lorary.model.prepared import prepared_marks
from lorary.model.setting import without_router
from lorary.recipes.display import Display
from lorary.recipes.open import base_of, template_of
from lorary.route import ROUTERS

ORACLE = "oracle"
# Fields of a setting that mean something to a router which looks at nothing.
_WITHOUT_LOOKING = ("allow", "general", "general_mode")


@dataclass(frozen=True)
class EvaluateSettings:
    """How to evaluate.

    Args:
        routers: names in `lorary.route.ROUTERS`, or `oracle`; `base` is always there.
        top_k: experts per token and layer.
        temperature: divides the scores.
        mix: `outputs` or `factors`.
        route: further fields of `lorary.model.setting.Routing`. Routers that look at nothing take those alone that say
            which experts there are; base and oracle take none.
        template: how rows become prompts; must be the one the experts were trained with.
        max_length: tokens of a row.
        rows: use the first so many test rows of a task.
        oracle_rows: rows on which the oracle of a held-out task is chosen.
        raw: rank options by the sum of their log-likelihood instead of the mean per token.
        allow_code: run what a model writes for tasks scored by `pass@k`, in a sandbox.
        unsafe_code: run it even where nothing isolates it.
    """

    routers: tuple[str, ...] = ("base", "uniform", "arrow", "oracle")
    top_k: int = 4
    temperature: float | Mapping[str, float] = 1.0
    mix: str = "outputs"
    route: Mapping[str, Any] = field(default_factory=dict)
    template: str = "plain"
    max_length: int = 1024
    rows: int = 100
    oracle_rows: int = 16
    raw: bool = False
    allow_code: bool = False
    unsafe_code: bool = False

    def __post_init__(self) -> None:
        for router in self.routers:
            if router != ORACLE and router not in ROUTERS:
                raise RouterError("a router must exist", found=router, remedy=f"some of {[*ROUTERS, ORACLE]}")
        if chosen := {"router", "experts", "preset"} & set(self.route):
            raise UsageError(
                "an evaluation names its routers by --routers, and experts by the oracle", found=sorted(chosen)
            )
        for router in {*self.routers, "uniform"} - {ORACLE}:
            self.setting(router)  # checks the ranges
        if self.unsafe_code and not self.allow_code:
            raise UsageError("--unsafe-code only says how code may run", found="no --allow-code", remedy="give both")
        for key in ("rows", "oracle_rows"):
            if getattr(self, key) < 1:
                raise UsageError(f"--{key.replace('_', '-')} must be at least 1", found=getattr(self, key))

    def setting(self, router: str) -> Routing:
        """What a router of the catalogue is asked for."""
        looks = ROUTERS[router].weights is None
        asked: dict[str, Any] = {"top_k": self.top_k, "temperature": self.temperature, "mix": self.mix}
        asked.update({key: value for key, value in self.route.items() if looks or key in _WITHOUT_LOOKING})
        return Routing(router, **asked)


@dataclass(frozen=True)
class Evaluation:
    """All cells, the comparisons between routers, and the tasks on which the base beats a router."""

    cells: list[Cell]
    comparisons: list[Comparison]
    base_guard: list[dict[str, Any]]
    settings: EvaluateSettings
    library: str
    base: str

    def mean(self, router: str, split: str) -> float | None:
        """Mean primary value of a router over the tasks of a split, or None where it has none."""
        values = [c.value for c in self.cells if c.primary and c.router == router and c.split == split]
        return sum(values) / len(values) if values else None

    def to_json(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        return {
            "library": self.library,
            "base": self.base,
            "settings": asdict(self.settings),
            "cells": [{k: v for k, v in asdict(cell).items() if k != "values"} for cell in self.cells],
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
            "base_guard": self.base_guard,
        }


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
        TaskError: if a task lacks test rows, or its metric cannot be computed.
        LibraryError: if the experts were trained with another template.
    """
    display = display or Display()
    template_of(library, settings.template)
    cache = ResultCache(library, fingerprint_of_model(base.model).digest)
    own = _experts_by_task(library)
    routers = list(dict.fromkeys(("base", *settings.routers)))
    jobs = [(task, router) for task in tasks.values() for router in routers]
    sandbox = make_sandbox(unsafe=settings.unsafe_code) if settings.allow_code else None
    cells: list[Cell] = []
    with _attached(base, library, settings, force_base), display.bar("evaluating", len(jobs)) as bar:
        for task, router in jobs:
            scorer = _Scorer(base, library, settings, own, cache, sandbox)
            cells += scorer.base_cells(task) if router == "base" else scorer.router_cells(task, router)
            bar.advance(f"{task.name} {router}")
    return summarise(cells, settings, library, base.files.name)


def run_evaluate(
    library_path: str,
    tasks_reference: str,
    *,
    routers: Sequence[str],
    names: Sequence[str] | None = None,
    base: str | None = None,
    force_base: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    route: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Evaluation:
    """Load a library, its base and tasks, and evaluate.

    Args:
        library_path: folder of the library.
        tasks_reference: as `lorary.data.tasks.load_tasks` takes it.
        routers: names of routers.
        names: tasks to take, all with test rows where None.
        base: the base model to load; the library's own where None.
        force_base: accept unrelated weights of the same shapes.
        device: where to run.
        dtype: of the base.
        route: fields of `Routing`, in place of those of the library's default router.
        changes: other fields of `EvaluateSettings`; None keeps the library's default router and template.

    Returns:
        The evaluation.
    """
    library = Library.open(library_path)
    if not library.names():
        raise LibraryError(f"library '{library.path}' must hold an adapter to be evaluated", found="none")
    given = {key: value for key, value in changes.items() if value is not None}
    asked = without_router(Routing(**library.default_router)) | dict(route or {})
    own = {key: asked.pop(key) for key in ("top_k", "temperature", "mix")}
    fields = {**own, "route": asked, **given, "template": template_of(library, given.get("template"))}
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
    loaded = load_base(base_of(library, base), dtype=dtype, device=device)
    return evaluate_library(loaded, library, tasks, settings, force_base=force_base)


def summarise(cells: list[Cell], settings: EvaluateSettings, library: Library, base_name: str) -> Evaluation:
    """Comparisons and base guard of finished cells."""
    primary = {(cell.router, cell.task): cell for cell in cells if cell.primary}
    routers = list(dict.fromkeys(cell.router for cell in cells))
    pairs = [(a, b) for i, a in enumerate(routers) for b in routers[:i]]
    comparisons = []
    for router, against in pairs:
        for split in ("held_in", "held_out"):
            compared = compare(primary, router, against, split)
            if compared:
                comparisons.append(compared)
    return Evaluation(cells, comparisons, base_guard(primary, routers), settings, library.name, base_name)


@dataclass
class _Scorer:
    base: Base
    library: Library
    settings: EvaluateSettings
    own: Mapping[str, str]
    cache: ResultCache
    sandbox: Sandbox | None

    def base_cells(self, task: Task) -> list[Cell]:
        """The base under both templates; the better one is primary."""
        templates = [self.settings.template]
        if getattr(self.base.tokenizer, "chat_template", None) and "chat" not in templates:
            templates.append("chat")
        runs = [self._cells(task, "base", Routing("base"), template) for template in templates]
        best = max(range(len(runs)), key=lambda i: runs[i][-1].value)
        return [replace(cell, primary=cell.primary and i == best) for i, run in enumerate(runs) for cell in run]

    def router_cells(self, task: Task, router: str) -> list[Cell]:
        """One router on one task."""
        s = self.settings
        if router != ORACLE:
            return self._cells(task, router, s.setting(router), s.template)
        expert = self.own.get(task.name) or self._best_expert(task)
        return self._cells(task, router, Routing(experts=[expert]), s.template, expert)

    def _cells(
        self, task: Task, router: str, setting: Routing, template_name: str, expert: str | None = None
    ) -> list[Cell]:
        s = self.settings
        metric = "acc_raw" if s.raw and task.metric == "acc" else task.metric
        key = self.cache.key(
            task=task.name, data=task.data_hash, rows=s.rows, metric=metric, template=template_name,
            routing=setting.to_json(), **self._conditions(), **self._prepared(setting),
        )  # fmt: skip
        found = self.cache.get(key)
        if found is None:
            found = [asdict(cell) for cell in self._score(task, router, setting, template_name, metric, expert)]
            self.cache.put(key, found)
        # What names the cell and is no part of its value may have changed since it was scored.
        labels = {
            "library": self.library.name,
            "router": router,
            "expert": expert,
            "family": task.family,
            "split": "held_in" if task.name in self.own else "held_out",
        }
        return [Cell(**{**cell, **labels}) for cell in found]

    def _score(
        self, task: Task, router: str, setting: Routing, template_name: str, metric: str, expert: str | None
    ) -> list[Cell]:
        rows = task.split("test")[: self.settings.rows]
        if not rows:
            raise TaskError(f"task '{task.name}' must have test rows to be evaluated on", found="none")
        started = time.perf_counter()
        with routing(self.base.model, setting):
            template = self._template(template_name)
            scores = score_rows(self.base.model, self.base.tokenizer, template, rows, metric, sandbox=self.sandbox)
        seconds = time.perf_counter() - started
        split = "held_in" if task.name in self.own else "held_out"
        cells = []
        for name, values, primary in (("loss", scores.loss, False), (scores.metric, scores.score, True)):
            low, high = bootstrap_interval(values)
            mean = sum(values) / len(values)
            cells.append(
                Cell(
                    library=self.library.name,
                    router=router,
                    task=task.name,
                    family=task.family,
                    split=split,
                    metric=name,
                    primary=primary,
                    value=mean,
                    low=low,
                    high=high,
                    n=len(values),
                    seconds=seconds,
                    template=template_name,
                    expert=expert,
                    values=values,
                )
            )
        loss = cells[0]
        value, low, high = map(perplexity, (loss.value, loss.low, loss.high))
        values = [perplexity(nats) for nats in loss.values]
        return [loss, replace(loss, metric="perplexity", value=value, low=low, high=high, values=values), cells[1]]

    def _best_expert(self, task: Task) -> str:
        """The single expert with the lowest loss on a task that has no expert of its own.

        On its validation rows, else its training rows; a task that has test rows only is judged on those, which an
        oracle may see.
        """
        splits = (task.split(split)[: self.settings.oracle_rows] for split in ("val", "train", "test"))
        rows = next(rows for rows in splits if rows)
        key = self.cache.key(
            oracle=task.name,
            data=task.data_hash,
            rows=len(rows),
            template=self.settings.template,
            **self._conditions(),
        )
        if (known := self.cache.get(key)) is not None:
            return str(known)
        template = self._template(self.settings.template)
        examples = [template.encode(row.source, row.target) for row in rows]
        losses = {}
        for name in self.library.names():
            with routing(self.base.model, {"experts": [name]}):
                losses[name] = sum(loss.mean for loss in answer_losses(self.base.model, examples))
        best = min(losses, key=lambda name: (losses[name], name))
        self.cache.put(key, best)
        return best

    def _conditions(self) -> dict[str, Any]:
        """What decides a score beside experts, task and router."""
        model = self.base.model
        return {"max_length": self.settings.max_length, "device": model.device.type, "dtype": str(model.dtype)}

    def _prepared(self, setting: Routing) -> dict[str, Any]:
        """What the router read beyond weights: prepared anew from other data, it scores anew."""
        marks = prepared_marks(setting, self.library)
        return {"prepared": marks} if marks else {}

    def _template(self, name: str) -> Template:
        return make_template(name, self.base.tokenizer, max_length=self.base.most_tokens(self.settings.max_length))


@contextmanager
def _attached(base: Base, library: Library, settings: EvaluateSettings, force_base: bool) -> Iterator[None]:
    attach(base.model, library, router="base", top_k=settings.top_k, tokenizer=base.tokenizer, force_base=force_base)
    try:
        yield
    finally:
        detach(base.model)


def _experts_by_task(library: Library) -> dict[str, str]:
    """For each task some expert was trained on, that expert; the one of fewest tasks where there are several."""
    by_task: dict[str, tuple[int, str]] = {}
    for row in library.describe():
        for task in row["tasks"]:
            candidate = (len(row["tasks"]), row["name"])
            by_task[task] = min(candidate, by_task.get(task, candidate))
    return {task: name for task, (_, name) in by_task.items()}
