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
from lorary.study.context import StudyContext
from lorary.study.record import stage_key
from lorary.study.scoring import (
    BASE_TEMPLATE,
    check_scored,
    questions_of,
    read_columns,
    score_column,
    write_columns,
)


def adapt_inputs(context: StudyContext, stage: AdaptStage) -> dict[str, Any]:
    """What decides the adapters and their cells, beside the libraries."""
    return {
        "methods": {method: _recorded(stage, method) for method in stage.methods},
        "train": changed_settings(stage.train),
        "rows": stage.held_out,
        "evaluate": dict(stage.evaluate),
        "tasks": questions_of(adapted_tasks(context, stage)),
        "base": context.base_content,
        "base_template": BASE_TEMPLATE,
        "dtype": context.study.run.precision,
    }


def adapted_tasks(context: StudyContext, stage: AdaptStage) -> Mapping[str, Task]:
    """The tasks of the stage: held out, with rows to train on, to validate on and to test on.

    Raises:
        TaskError: if there is none, or one is named that is not held out.
    """
    held_out = context.held_out_tasks
    if missing := [name for name in stage.tasks or () if name not in held_out]:
        raise TaskError(f"adapt:{stage.name} must name held-out tasks of the study", found=missing[0])
    trainable = {name: task for name, task in held_out.items() if task.split("train") and task.split("val")}
    chosen = {name: held_out[name] for name in stage.tasks} if stage.tasks else trainable
    if not chosen:
        raise TaskError(f"adapt:{stage.name} must have held-out tasks with training and validation rows", found="none")
    return chosen


def run_adapt_stage(context: StudyContext, stage: AdaptStage, key: str) -> str:
    """Adapt by every method that this key has not done, and score what becomes of it.

    Returns:
        A line on what was done.

    Raises:
        OutOfTime: between two methods or cells; what is finished is kept.
        TaskError: if cells could not be scored; they are tried again by the next run.
    """
    columns, tasks = read_columns(context, stage, key), adapted_tasks(context, stage)
    missing = [run for run in stage.runs() if run not in columns or columns[run]["failures"]]
    for run in missing:
        context.display.check_time()
        columns[run] = _adapted(context, stage, run[1], tasks)
        write_columns(context, stage, key, columns)
    check_scored(stage, columns)
    return f"{len(stage.methods)} methods on {len(tasks)} tasks"


def _adapted(context: StudyContext, stage: AdaptStage, method: str, tasks: Mapping[str, Task]) -> dict[str, Any]:
    """A column of one method: its adapters lie in a library of their own, called by what decides them."""
    key = _adapters_key(context, stage, method, tasks)
    into = open_or_create(str(context.library(f"{stage.name}-{method}-{key[:8]}")), context.study.base)
    source = Library.open(context.library(stage.library))
    result = adapt_library(
        context.base,
        source,
        tasks,
        _settings(context, stage, method),
        into=into,
        run=context.study.run,
        display=context.display,
    )
    settings = EvaluateSettings(routers=(ORACLE,), rows=stage.held_out, **stage.evaluate)
    column = score_column(context, into, stage.name, tasks, settings, f"{stage.name}/{method}")
    for document in (*column["cells"], *column["failures"]):
        document["router"] = method if document["router"] == ORACLE else document["router"]
    return {**column, "adapted": {key: value for key, value in asdict(result).items() if key != "library"}}


def _adapters_key(context: StudyContext, stage: AdaptStage, method: str, tasks: Mapping[str, Task]) -> str:
    sources = [context.study.stage(name) for name in stage.needs]
    return stage_key(
        method=_recorded(stage, method), train=changed_settings(stage.train), dtype=context.study.run.precision,
        tasks={name: task.data_hash for name, task in tasks.items()},
        sources=[build_outputs(context, source) for source in sources if isinstance(source, BuildStage)],
    )  # fmt: skip


def _recorded(stage: AdaptStage, method: str) -> dict[str, Any]:
    """Settings of a method; where the study lies is none of them."""
    settings = stage.method_settings(method)
    return {**recorded_adaptation(settings), "start_library": stage.joint if method == JOINT else None}


def _settings(context: StudyContext, stage: AdaptStage, method: str) -> AdaptSettings:
    return stage.method_settings(method, None if stage.joint is None else str(context.library(stage.joint)))
