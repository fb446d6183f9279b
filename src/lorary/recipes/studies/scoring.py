"""An evaluate stage: libraries by routers by splits, one column at a time, each kept as soon as it is whole."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lorary.data.tasks import Task
from lorary.evaluate.cache import ResultCache
from lorary.evaluate.cells import BASE
from lorary.library.document import LIBRARY_FILE
from lorary.library.files import read_json, sha256
from lorary.library.store import Library
from lorary.model.base import Base, load_base
from lorary.model.spec import parse_spec
from lorary.recipes.bench import Bench, KnownBase, at_bench, known
from lorary.recipes.evaluate import EvaluateSettings
from lorary.recipes.evaluation import Found
from lorary.recipes.open import template_of
from lorary.recipes.prepare import prepare_library
from lorary.recipes.prepare_data import own_data
from lorary.recipes.prepare_experts import PrepareSettings
from lorary.recipes.scorer import Scorer
from lorary.recipes.studies.config import BuildStage, EvaluateStage, Run, Stage, identity
from lorary.recipes.studies.place import Place
from lorary.recipes.studies.record import write_document
from lorary.route import ROUTERS

Columns = dict[Run, dict[str, Any]]


def evaluate_inputs(place: Place, stage: EvaluateStage) -> dict[str, Any]:
    """What decides the cells, beside the libraries."""
    tasks = [task for run in stage.runs() for task in tasks_of(place, run).values()]
    return {
        "runs": [list(run) for run in stage.runs()],
        "rows": [stage.held_in, stage.held_out],
        "settings": dict(stage.settings),
        "tasks": {task.name: task.data_hash for task in tasks},
        "base": place.base_digest,
        "dtype": place.study.run.dtype,
    }


def tasks_of(place: Place, run: Run) -> Mapping[str, Task]:
    """The tasks of a column: those that its library was trained on, or the held-out ones."""
    library, _, split = run
    if split == "held_out":
        return place.held_out_tasks
    built = place.study.stage(f"build:{library}")
    assert isinstance(built, BuildStage)
    return {name: task for name, task in place.training_tasks(built)[1].items() if task.split("test")}


def run_evaluate_stage(place: Place, stage: EvaluateStage, key: str) -> str:
    """Score every column that is not there yet.

    Args:
        place: of the study.
        stage: what to score.
        key: of the stage; columns that another key has left are scored again.

    Returns:
        A line on what was scored.

    Raises:
        OutOfTime: between two cells; cells and columns that were finished are kept.
    """
    columns = read_columns(place, stage, key)
    missing = [run for run in stage.runs() if run not in columns]
    if missing:
        base = load_base(place.study.base, dtype=place.study.run.dtype, device=place.study.run.device)
    for number, run in enumerate(missing):
        library, router, split = run
        title = f"column {number + 1}/{len(missing)} {library}/{router} {split.replace('_', '-')}"
        settings = EvaluateSettings(routers=(router,), rows=getattr(stage, split), **stage.settings)
        columns[run] = score_column(
            place, base, Library.open(place.library(library)), library, tasks_of(place, run), settings, title
        )
        write_columns(place, stage, key, columns)
    failures = sum(len(column["failures"]) for column in columns.values())
    return f"{len(columns)} columns" + (f", {failures} cells could not be scored" if failures else "")


def score_column(
    place: Place,
    base: Base,
    library: Library,
    name: str,
    tasks: Mapping[str, Task],
    settings: EvaluateSettings,
    title: str,
) -> dict[str, Any]:
    """One router of a library on some tasks, with the base beside it; what was scored before is read.

    Args:
        place: of the study.
        base: the base model.
        library: to score.
        name: what its cells call it.
        tasks: with test rows.
        settings: with one router.
        title: for the display.

    Returns:
        `cells`, `failures` and `routing`, as values of JSON.

    Raises:
        OutOfTime: between two cells.
    """
    (router,) = settings.routers
    template_of(library, settings.template)
    about, found = known(base), Found()
    place.display.check_time()
    _prepare(place, base, library, router)
    bench = Bench(about, library, force_base=False)
    scorer = Scorer(bench, name, settings, _other_results(place, about, library))
    with at_bench(bench), place.display.bar(title, len(tasks)) as bar:
        for task in tasks.values():
            for one in dict.fromkeys((BASE, router)):
                place.display.check_time()
                scorer.score(task, one, found)
            bar.advance(task.name)
    return {
        "cells": [asdict(cell) for cell in found.cells],
        "failures": [asdict(failure) for failure in found.failures],
        "routing": [asdict(routing) for routing in found.routing],
    }


def _prepare(place: Place, base: Base, library: Library, router: str) -> None:
    """What a router knows experts by, beside their weights: rows of the tasks that they were trained on."""
    name = parse_spec(router).name
    if name not in ROUTERS or ROUTERS[name].needs != "prepared":
        return
    settings = PrepareSettings(name)
    reference = place.reference(place.study.train)
    data = own_data(library, library.names(), reference, {}, settings.num_rows, settings.seed)
    prepare_library(base, library, data, settings, display=place.display)


def _other_results(place: Place, base: KnownBase, own: Library) -> Sequence[ResultCache]:
    """Results of the study's other libraries, where the base may have been scored already."""
    paths = [place.library(stage.name) for stage in place.study.stages if isinstance(stage, BuildStage)]
    there = [path for path in paths if (path / LIBRARY_FILE).exists() and path.resolve() != own.path.resolve()]
    return [ResultCache(Library.open(path), base.digest) for path in there]


def read_columns(place: Place, stage: Stage, key: str | None = None) -> Columns:
    """The columns that a stage has finished; none of them where they belong to another key.

    Args:
        place: of the study.
        stage: an evaluate or adapt stage.
        key: of the stage as it is now; None takes what is there.
    """
    path = place.results(identity(stage))
    if not path.exists():
        return {}
    document = read_json(path)
    if key is not None and document["key"] != key:
        return {}
    return {(c["library"], c["router"], c["split"]): c for c in document["columns"]}


def write_columns(place: Place, stage: Stage, key: str, columns: Columns) -> None:
    """Keep finished columns, at once or not at all.

    Args:
        place: of the study.
        stage: an evaluate or adapt stage.
        key: of the stage.
        columns: what was scored, by library, router and split.
    """
    listed = [
        {**column, "library": library, "router": router, "split": split}
        for (library, router, split), column in columns.items()
    ]
    write_document(place.results(identity(stage)), {"key": key, "columns": listed})


def file_outputs(place: Place, stage: Stage) -> dict[str, str]:
    """Hash of the file of what a stage measured; empty where there is none."""
    path = place.results(identity(stage))
    return {path.name: sha256(path.read_bytes())} if path.exists() else {}
