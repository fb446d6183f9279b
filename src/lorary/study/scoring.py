"""An evaluate stage: libraries by routers by splits, one column at a time, each kept as soon as it is whole."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lorary.data.schema import Task
from lorary.errors import TaskError
from lorary.evaluate.cache import ResultCache
from lorary.evaluate.cells import BASE
from lorary.evaluate.evaluation import ScoredCells
from lorary.evaluate.sandbox import make_sandbox
from lorary.evaluate.scorer import Scorer
from lorary.evaluate.seated_base import KnownBase, SeatedBase, known_base
from lorary.evaluate.settings import EvaluateSettings
from lorary.library.files import sha256
from lorary.library.layout import LIBRARY_FILE
from lorary.library.opening import template_of
from lorary.library.store import Library
from lorary.prepare.expert_rows import rows_of_experts
from lorary.prepare.prepare_library import prepare_library
from lorary.prepare.settings import PrepareSettings
from lorary.route import ROUTERS
from lorary.route.spec import parse_spec
from lorary.study.config import BuildStage, EvaluateStage, Run, Stage, identity
from lorary.study.context import StudyContext
from lorary.study.record import read_document, write_document

Columns = dict[Run, dict[str, Any]]
# How the base's template is chosen: columns of another way are scored again, from the cells that libraries keep.
BASE_TEMPLATE = "validation rows"


def evaluate_inputs(context: StudyContext, stage: EvaluateStage) -> dict[str, Any]:
    """What decides the cells, beside the libraries."""
    questions = {f"{library} {split}": questions_of(tasks_of(context, (library, router, split)))
             for library, router, split in stage.runs() if router == stage.routers[0]}  # fmt: skip
    return {
        "runs": [list(run) for run in stage.runs()],
        "rows": [stage.held_in, stage.held_out],
        "settings": dict(stage.settings),
        "tasks": questions,
        "base": context.base_content,
        "base_template": BASE_TEMPLATE,
        "dtype": context.study.run.dtype,
    }


def questions_of(tasks: Mapping[str, Task]) -> dict[str, list[str]]:
    """What is asked, by task: metric and hash of the data."""
    return {name: [task.metric, task.data_hash] for name, task in tasks.items()}


def tasks_of(context: StudyContext, run: Run) -> Mapping[str, Task]:
    """The tasks of a column: those that its library was trained on, or the held-out ones."""
    library, _, split = run
    if split == "held_out":
        return context.held_out_tasks
    trained = context.training_tasks(_built(context, library))[1]
    # What a library learnt from other data is asked on the study's own rows, as every other library.
    study_tasks = (
        {}
        if context.study.train.reference is None and context.tasks_folder is None
        else context.listed(context.study.train)
    )
    tasks = {name: study_tasks.get(name, task) for name, task in trained.items()}
    return {name: task for name, task in tasks.items() if task.split("test")}


def _built(context: StudyContext, library: str) -> BuildStage:
    stage = context.study.stage(f"build:{library}")
    assert isinstance(stage, BuildStage)
    return stage


def run_evaluate_stage(context: StudyContext, stage: EvaluateStage, key: str) -> str:
    """Score every column that this key of the stage has not scored.

    Returns:
        A line on what was scored.

    Raises:
        OutOfTime: between two cells; cells and columns that were finished are kept.
        TaskError: if cells could not be scored; they are tried again by the next run.
    """
    columns = read_columns(context, stage, key)
    missing = [run for run in stage.runs() if run not in columns or columns[run]["failures"]]
    for number, run in enumerate(missing):
        library, router, split = run
        title = f"column {number + 1}/{len(missing)} {library}/{router} {split.replace('_', '-')}"
        settings = EvaluateSettings(routers=(router,), rows=getattr(stage, split), **stage.settings)
        opened = Library.open(context.library(library))
        _prepare(context, opened, router, _built(context, library).data)
        columns[run] = score_column(context, opened, library, tasks_of(context, run), settings, title)
        write_columns(context, stage, key, columns)
    check_scored(stage, columns)
    return f"{len(columns)} columns"


def check_scored(stage: Stage, columns: Columns) -> None:
    """Refuse to call a stage done that owes cells.

    Raises:
        TaskError: if cells could not be scored.
    """
    failures = [failure for column in columns.values() for failure in column["failures"]]
    if failures:
        first = failures[0]
        raise TaskError(
            f"all cells of {identity(stage)} must be scored",
            found=f"{len(failures)} that could not be; {first['library']}, {first['router']}, {first['task']}: "
            f"{first['rule']}" + (f" (found: {first['found']})" if first["found"] else ""),
            remedy=first["remedy"] or "the report names all of them; run again to try them again",
        )


def score_column(
    context: StudyContext,
    library: Library,
    name: str,
    tasks: Mapping[str, Task],
    settings: EvaluateSettings,
    title: str,
) -> dict[str, Any]:
    """One router of a library, which cells call by the name, and the base; what was scored before is read.

    Returns:
        `cells`, `failures`, `routing` and `base_templates`, as values of JSON. In which template the base counts is
        chosen once, over all columns of a study.

    Raises:
        OutOfTime: between two cells.
    """
    (router,) = settings.routers
    template_of(library, settings.template)
    base, scored = known_base(context.base), ScoredCells()
    context.display.check_time()
    seated = SeatedBase(base, library, template=settings.template, force_base=False)
    sandbox = make_sandbox(unsafe=settings.unsafe_code) if settings.allow_code else None
    scorer = Scorer(seated, name, settings, _other_results(context, base, library), sandbox, tasks.values())
    with seated, context.display.bar(title, len(tasks)) as bar:
        for task in tasks.values():
            for scored_router in dict.fromkeys((BASE, router)):
                context.display.check_time()
                scorer.score(task, scored_router, scored)
            bar.advance(task.name)
    return {
        "cells": [asdict(cell) for cell in scored.cells],
        "failures": [asdict(failure) for failure in scored.failures],
        "routing": [asdict(routing) for routing in scored.routing],
        "base_templates": [asdict(look) for look in scored.base_templates],
    }


def _prepare(context: StudyContext, library: Library, router: str, data: str | None) -> None:
    """What a router knows experts by, beside their weights: rows of the tasks that they were trained on."""
    name = parse_spec(router).name
    if name not in ROUTERS or ROUTERS[name].needs != "prepared":
        return
    settings = PrepareSettings(name)
    reference = data or context.reference(context.study.train)
    rows = rows_of_experts(library, library.names(), reference, {}, settings.num_rows, settings.seed)
    prepare_library(context.base, library, rows, settings, display=context.display)


def _other_results(context: StudyContext, base: KnownBase, library: Library) -> Sequence[ResultCache]:
    """Results of the study's other libraries, where the base may have been scored already."""
    paths = [context.library(stage.name) for stage in context.study.stages if isinstance(stage, BuildStage)]
    existing = [path for path in paths if (path / LIBRARY_FILE).exists() and path.resolve() != library.path.resolve()]
    return [ResultCache(Library.open(path), base.content) for path in existing]


def read_columns(context: StudyContext, stage: Stage, key: str) -> Columns:
    """The columns that a stage has finished; none of them where they belong to another key."""
    document = read_document(context.results(identity(stage)))
    if document.get("key") != key:
        return {}
    return {(c["library"], c["router"], c["split"]): c for c in document["columns"]}


def write_columns(context: StudyContext, stage: Stage, key: str, columns: Columns) -> None:
    """Keep finished columns, at once or not at all."""
    listed = [
        {**column, "library": library, "router": router, "split": split}
        for (library, router, split), column in columns.items()
    ]
    write_document(context.results(identity(stage)), {"key": key, "columns": listed})


def file_outputs(context: StudyContext, stage: Stage) -> dict[str, str]:
    """Hash of the file of what a stage measured; empty where there is none."""
    path = context.results(identity(stage))
    return {path.name: sha256(path.read_bytes())} if path.exists() else {}
