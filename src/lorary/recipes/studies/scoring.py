"""An evaluate stage: libraries by routers by splits, one column at a time, each kept as soon as it is whole."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lorary.data.tasks import Task
from lorary.library.files import read_json, sha256
from lorary.library.store import Library
from lorary.model.base import load_base
from lorary.recipes.evaluate import EvaluateSettings, evaluate_library
from lorary.recipes.studies.config import BuildStage, EvaluateStage, Stage, identity
from lorary.recipes.studies.place import Place
from lorary.recipes.studies.record import write_document

Run = tuple[str, str, str]


def evaluate_inputs(place: Place, stage: EvaluateStage) -> dict[str, Any]:
    """What decides the cells, beside the libraries."""
    tasks = [task for run in stage.runs() for task in tasks_of(place, run).values()]
    return {
        "runs": stage.runs(),
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
    found = read_columns(place, stage, key)
    missing = [run for run in stage.runs() if run not in found]
    if missing:
        base = load_base(place.study.base, dtype=place.study.run.dtype, device=place.study.run.device)
    for number, run in enumerate(missing):
        library, router, split = run
        place.display.say(f"  column {number + 1} of {len(missing)}: {library}/{router}, {split.replace('_', '-')}")
        place.display.check_time()
        settings = EvaluateSettings(routers=(router,), rows=getattr(stage, split), **stage.settings)
        evaluation = evaluate_library(
            base, Library.open(place.library(library)), tasks_of(place, run), settings, display=place.display
        )
        found[run] = [asdict(cell) for cell in evaluation.cells if cell.router in (router, "base")]
        write_columns(place, stage, key, found)
    return f"{len(stage.runs())} columns"


def read_columns(place: Place, stage: Stage, key: str | None = None) -> dict[Run, list[dict[str, Any]]]:
    """The cells of the columns that a stage has finished; none of them where they belong to another key.

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
    return {(c["library"], c["router"], c["split"]): c["cells"] for c in document["columns"]}


def write_columns(place: Place, stage: Stage, key: str, columns: Mapping[Run, list[dict[str, Any]]]) -> None:
    """Keep finished columns, at once or not at all.

    Args:
        place: of the study.
        stage: an evaluate or adapt stage.
        key: of the stage.
        columns: cells by library, router and split.
    """
    listed = [
        {"library": library, "router": router, "split": split, "cells": cells}
        for (library, router, split), cells in columns.items()
    ]
    write_document(place.results(identity(stage)), {"key": key, "columns": listed})


def file_outputs(place: Place, stage: Stage) -> dict[str, str]:
    """Hash of the file of what a stage measured; empty where there is none."""
    path = place.results(identity(stage))
    return {path.name: sha256(path.read_bytes())} if path.exists() else {}
