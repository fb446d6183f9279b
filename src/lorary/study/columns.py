"""What a study has scored so far, out of the files that its stages have left."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from lorary.evaluate.base_template import BaseTemplate, choose_templates, count_templates
from lorary.evaluate.cells import BASE, OF_ROWS, Cell, base_in
from lorary.evaluate.compare import failed_tasks
from lorary.evaluate.metrics import REPORTED
from lorary.study.answers import StudyColumn
from lorary.study.config import SPLITS, AdaptStage, DriftStage, EvaluateStage, identity
from lorary.study.context import StudyContext
from lorary.study.record import read_document
from lorary.study.scoring import Columns, read_columns


def scored_columns(context: StudyContext, keys: Mapping[str, str | None]) -> tuple[dict[str, Columns], dict[str, Any]]:
    """Columns by identity of their stage, and drift by name: those that the settings, data and libraries of now made.

    What other ones have left is no result of this study any more. The base counts in the template that is chosen over
    all columns together.
    """
    columns: dict[str, Columns] = {}
    drift: dict[str, Any] = {}
    for stage in context.study.stages:
        name, key = identity(stage), keys[identity(stage)]
        if isinstance(stage, (EvaluateStage, AdaptStage)):
            columns[name] = {} if key is None else read_columns(context, stage, key)
        elif isinstance(stage, DriftStage):
            document = read_document(context.results(name))
            drift |= {stage.name: document} if key is not None and document.get("key") == key else {}
    every = [column for by_run in columns.values() for column in by_run.values()]
    chosen = choose_templates(BaseTemplate(**look) for column in every for look in column["base_templates"])
    for column in every:
        column["cells"] = [asdict(cell) for cell in count_templates((Cell(**c) for c in column["cells"]), chosen)]
    return columns, drift


def owed_cells(context: StudyContext) -> set[tuple[str, str]]:
    """(cell, split) of all columns of the study, the base beside each library."""
    scoring = [stage for stage in context.study.stages if isinstance(stage, (EvaluateStage, AdaptStage))]
    runs = [run for stage in scoring for run in stage.runs()]
    return {(f"{library}/{name}", split) for library, router, split in runs for name in (router, "base")}


def compared_columns(context: StudyContext, scored: Mapping[str, Columns]) -> list[StudyColumn]:
    """All columns that are scored; of one that several stages have scored, that with most rows.

    A task on which a column of a split failed is left out of all of that split, as in an evaluation. A held-out column
    is followed by its part on every named set.
    """
    best: dict[tuple[str, str, str], tuple[int, StudyColumn]] = {}
    for stage in context.study.stages:
        if not isinstance(stage, (EvaluateStage, AdaptStage)):
            continue
        for (library, router, split), column in scored[identity(stage)].items():
            for name, counting in _counting(router, column["cells"]).items():
                values = {cell["task"]: cell["values"] for cell in counting}
                rows, where = sum(map(len, values.values())), (library, name, split)
                if rows and rows > best.get(where, (0, None))[0]:
                    questions = {cell["task"]: (cell["metric"], cell["data"]) for cell in counting}
                    failed = [failure["task"] for failure in column["failures"] if failure["router"] == name]
                    best[where] = (rows, StudyColumn(library, name, split, values, identity(stage), questions, failed))
    columns = [
        column for split in SPLITS for column in _on_common_tasks([c for _, c in best.values() if c.split == split])
    ]
    return [part for column in columns for part in (column, *_by_set(context, column))]


def _counting(router: str, cells: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The cells of a router, of the base, and of the base in each of two templates throughout, by their names."""
    counting = {
        name: [cell for cell in cells if cell["router"] == name and cell["primary"]]
        for name in dict.fromkeys((router, BASE))
    }
    by_template: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        if cell["router"] == BASE and cell["metric"] not in REPORTED:
            by_template.setdefault(base_in(cell["template"]), []).append(cell)
    return {**counting, **(by_template if len(by_template) > 1 else {})}


def left_out_tasks(columns: Sequence[StudyColumn]) -> list[dict[str, str]]:
    """Tasks that are in no figure since a column of their split failed on them, and these columns."""
    return [
        {"task": task, "split": column.split, "cell": column.cell}
        for column in columns
        if column.split in SPLITS
        for task in dict.fromkeys(column.failed)
        if task in column.left_out
    ]


def _on_common_tasks(columns: Sequence[StudyColumn]) -> list[StudyColumn]:
    """Columns of a split without the tasks on which one of them failed."""
    scored = [(column.cell, task) for column in columns for task in column.values]
    left_out = failed_tasks(scored, [(column.cell, task) for column in columns for task in column.failed])
    common = []
    for column in columns:
        values = {task: rows for task, rows in column.values.items() if task not in left_out}
        if values:
            questions = {task: column.questions[task] for task in values}
            common.append(replace(column, values=values, questions=questions, left_out=sorted(left_out)))
    return common


def _by_set(context: StudyContext, column: StudyColumn) -> list[StudyColumn]:
    """The parts of a held-out column on the sets that have a name, unless that is all there is."""
    if column.split != "held_out":
        return []
    parts = []
    for name, tasks in context.held_out_sets.items():
        values = {task: rows for task, rows in column.values.items() if task in tasks}
        if values and len(tasks) < len(context.held_out_tasks):
            questions = {task: column.questions[task] for task in values}
            gone = [task for task in column.left_out if task in tasks]
            parts.append(
                replace(column, split=f"{column.split}: {name}", values=values, questions=questions, left_out=gone)
            )
    return parts


def cell_documents(context: StudyContext, scored: Mapping[str, Columns]) -> list[dict[str, Any]]:
    """One row per cell, as `lorary evaluate --json` gives them, with the stage."""
    cells = {}
    for stage in context.study.stages:
        if isinstance(stage, (EvaluateStage, AdaptStage)):
            for (library, _, split), column in scored[identity(stage)].items():
                for cell in column["cells"]:
                    document = {key: value for key, value in cell.items() if key not in OF_ROWS}
                    key = (library, cell["router"], cell["task"], cell["metric"], cell["template"], cell["n"])
                    cells[key] = {**document, "library": library, "split": split, "stage": identity(stage)}
    return list(cells.values())


def failure_documents(context: StudyContext, scored: Mapping[str, Columns]) -> list[dict[str, Any]]:
    """Cells that could not be scored, and why."""
    failures: list[dict[str, Any]] = []
    for stage in context.study.stages:
        if isinstance(stage, (EvaluateStage, AdaptStage)):
            for column in scored[identity(stage)].values():
                failures += [{**failure, "stage": identity(stage)} for failure in column["failures"]]
    return failures
