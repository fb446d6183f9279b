"""An adapt stage: each held-out task gets an adapter by each method, scored on its test rows."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lorary.adapt.adapt_library import adapt_library
from lorary.adapt.settings import JOINT, AdaptSettings, recorded_adaptation
from lorary.data.schema import Task
from lorary.errors import TaskError
from lorary.evaluate.cells import ORACLE
from lorary.evaluate.settings import EvaluateSettings
from lorary.library.opening import open_or_create
from lorary.library.store import Library
from lorary.study.building import build_outputs, changed_settings
from lorary.study.config import AdaptStage, BuildStage
from lorary.study.context import Place
from lorary.study.record import stage_key
from lorary.study.scoring import asked_of, check_scored, read_columns, score_column, write_columns


def adapt_inputs(place: Place, stage: AdaptStage) -> dict[str, Any]:
    """What decides the adapters and their cells, beside the libraries."""
    return {
        "methods": {method: _recorded(place, stage, method) for method in stage.methods},
        "train": changed_settings(stage.train),
        "rows": stage.held_out,
        "evaluate": dict(stage.evaluate),
        "tasks": asked_of(adapted_tasks(place, stage)),
        "base": place.base_content,
        "dtype": place.study.run.dtype,
    }


def adapted_tasks(place: Place, stage: AdaptStage) -> Mapping[str, Task]:
    """The tasks of the stage: held out, with rows to train on, to validate on and to test on.

    Raises:
        TaskError: if there is none, or one is named that is not held out.
    """
    known = place.held_out_tasks
    if missing := [name for name in stage.tasks or () if name not in known]:
        raise TaskError(f"adapt:{stage.name} must name held-out tasks of the study", found=missing[0])
    found = {name: task for name, task in known.items() if task.split("train") and task.split("val")}
    chosen = {name: known[name] for name in stage.tasks} if stage.tasks else found
    if not chosen:
        raise TaskError(f"adapt:{stage.name} must have held-out tasks with training and validation rows", found="none")
    return chosen


def run_adapt_stage(place: Place, stage: AdaptStage, key: str) -> str:
    """Adapt by every method that is not done, and score what becomes of it.

    Args:
        place: of the study.
        stage: what to adapt.
        key: of the stage; what another key has left is done again.

    Returns:
        A line on what was done.

    Raises:
        OutOfTime: between two methods or cells; what is finished is kept.
        TaskError: if cells could not be scored; they are tried again by the next run.
    """
    columns, tasks = read_columns(place, stage, key), adapted_tasks(place, stage)
    missing = [run for run in stage.runs() if run not in columns or columns[run]["failures"]]
    for run in missing:
        place.display.check_time()
        columns[run] = _adapted(place, stage, run[1], tasks)
        write_columns(place, stage, key, columns)
    check_scored(stage, columns)
    return f"{len(stage.methods)} methods on {len(tasks)} tasks"


def _adapted(place: Place, stage: AdaptStage, method: str, tasks: Mapping[str, Task]) -> dict[str, Any]:
    """A column of one method: its adapters lie in a library of their own, called by what decides them."""
    key = _adapters_key(place, stage, method, tasks)
    into = open_or_create(str(place.library(f"{stage.name}-{method}-{key[:8]}")), place.study.base)
    source = Library.open(place.library(stage.library))
    result = adapt_library(
        place.base,
        source,
        tasks,
        _settings(place, stage, method),
        into=into,
        run=place.study.run,
        display=place.display,
    )
    settings = EvaluateSettings(routers=(ORACLE,), rows=stage.held_out, **stage.evaluate)
    column = score_column(place, into, stage.name, tasks, settings, f"{stage.name}/{method}")
    for told in (*column["cells"], *column["failures"]):
        told["router"] = method if told["router"] == ORACLE else told["router"]
    return {**column, "adapted": {key: value for key, value in asdict(result).items() if key != "library"}}


def _adapters_key(place: Place, stage: AdaptStage, method: str, tasks: Mapping[str, Task]) -> str:
    sources = [place.study.stage(name) for name in stage.needs]
    return stage_key(
        method=_recorded(place, stage, method), train=changed_settings(stage.train), dtype=place.study.run.dtype,
        tasks={name: task.data_hash for name, task in tasks.items()},
        sources=[build_outputs(place, source) for source in sources if isinstance(source, BuildStage)],
    )  # fmt: skip


def _recorded(place: Place, stage: AdaptStage, method: str) -> dict[str, Any]:
    """Settings of a method; where the study lies is none of them."""
    settings = stage.method_settings(method)
    return {**recorded_adaptation(settings), "start_library": stage.joint if method == JOINT else None}


def _settings(place: Place, stage: AdaptStage, method: str) -> AdaptSettings:
    return stage.method_settings(method, None if stage.joint is None else str(place.library(stage.joint)))
