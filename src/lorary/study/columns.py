"""What a study has scored so far, out of the files that its stages have left."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lorary.evaluate.compare import failed_tasks
from lorary.study.answers import Column
from lorary.study.config import SPLITS, AdaptStage, DriftStage, EvaluateStage, identity
from lorary.study.context import Place
from lorary.study.record import read_document
from lorary.study.scoring import Columns, read_columns


def gather_scored(place: Place, keys: Mapping[str, str | None]) -> tuple[dict[str, Columns], dict[str, Any]]:
    """Columns by identity of their stage, and drift by name: those that the settings, data and libraries of now made.

    What other ones have left is no result of this study any more.

    Args:
        place: of the study.
        keys: of all stages, as things are.
    """
    columns: dict[str, Columns] = {}
    drift: dict[str, Any] = {}
    for stage in place.study.stages:
        name, key = identity(stage), keys[identity(stage)]
        if isinstance(stage, (EvaluateStage, AdaptStage)):
            columns[name] = {} if key is None else read_columns(place, stage, key)
        elif isinstance(stage, DriftStage):
            found = read_document(place.results(name))
            drift |= {stage.name: found} if key is not None and found.get("key") == key else {}
    return columns, drift


def owed_columns(place: Place) -> set[tuple[str, str]]:
    """(cell, split) of all columns of the study, the base beside each library."""
    scoring = [stage for stage in place.study.stages if isinstance(stage, (EvaluateStage, AdaptStage))]
    runs = [run for stage in scoring for run in stage.runs()]
    return {(f"{library}/{name}", split) for library, router, split in runs for name in (router, "base")}


def gather_columns(place: Place, scored: Mapping[str, Columns]) -> list[Column]:
    """All columns that are scored; of one that several stages have scored, that with most rows.

    A task on which a column of a split failed is left out of all of that split, as in an evaluation. A held-out column
    is followed by its part on every named set.
    """
    best: dict[tuple[str, str, str], tuple[int, Column]] = {}
    for stage in place.study.stages:
        if not isinstance(stage, (EvaluateStage, AdaptStage)):
            continue
        for (library, router, split), column in scored[identity(stage)].items():
            for name in dict.fromkeys((router, "base")):
                primary = [cell for cell in column["cells"] if cell["router"] == name and cell["primary"]]
                values = {cell["task"]: cell["values"] for cell in primary}
                rows, where = sum(map(len, values.values())), (library, name, split)
                if rows and rows > best.get(where, (0, None))[0]:
                    asked = {cell["task"]: (cell["metric"], cell["data"]) for cell in primary}
                    failed = [one["task"] for one in column["failures"] if one["router"] == name]
                    best[where] = (rows, Column(library, name, split, values, identity(stage), asked, failed))
    columns = [
        column for split in SPLITS for column in _on_common_tasks([c for _, c in best.values() if c.split == split])
    ]
    return [part for column in columns for part in (column, *_by_set(place, column))]


def gather_left_out(columns: Sequence[Column]) -> list[dict[str, str]]:
    """Tasks that are in no figure since a column of their split failed on them, and these columns.

    Args:
        columns: as `gather_columns` gives them.
    """
    return [
        {"task": task, "split": column.split, "cell": column.cell}
        for column in columns
        if column.split in SPLITS
        for task in dict.fromkeys(column.failed)
        if task in column.left_out
    ]


def _on_common_tasks(columns: Sequence[Column]) -> list[Column]:
    """Columns of a split without the tasks on which one of them failed."""
    scored = [(column.cell, task) for column in columns for task in column.values]
    left_out = failed_tasks(scored, [(column.cell, task) for column in columns for task in column.failed])
    common = []
    for column in columns:
        values = {task: own for task, own in column.values.items() if task not in left_out}
        if values:
            asked = {task: column.asked[task] for task in values}
            common.append(replace(column, values=values, asked=asked, left_out=sorted(left_out)))
    return common


def _by_set(place: Place, column: Column) -> list[Column]:
    """The parts of a held-out column on the sets that have a name, unless that is all there is."""
    if column.split != "held_out":
        return []
    found = []
    for name, tasks in place.held_out_sets.items():
        values = {task: own for task, own in column.values.items() if task in tasks}
        if values and len(tasks) < len(place.held_out_tasks):
            asked = {task: column.asked[task] for task in values}
            gone = [task for task in column.left_out if task in tasks]
            found.append(replace(column, split=f"{column.split}: {name}", values=values, asked=asked, left_out=gone))
    return found


def gather_cells(place: Place, scored: Mapping[str, Columns]) -> list[dict[str, Any]]:
    """One row per cell, as `lorary evaluate --json` gives them, with the stage."""
    found = {}
    for stage in place.study.stages:
        if isinstance(stage, (EvaluateStage, AdaptStage)):
            for (library, _, split), column in scored[identity(stage)].items():
                for cell in column["cells"]:
                    told = {key: value for key, value in cell.items() if key != "values"}
                    key = (library, cell["router"], cell["task"], cell["metric"], cell["template"], cell["n"])
                    found[key] = {**told, "library": library, "split": split, "stage": identity(stage)}
    return list(found.values())


def gather_failures(place: Place, scored: Mapping[str, Columns]) -> list[dict[str, Any]]:
    """Cells that could not be scored, and why."""
    found: list[dict[str, Any]] = []
    for stage in place.study.stages:
        if isinstance(stage, (EvaluateStage, AdaptStage)):
            for column in scored[identity(stage)].values():
                found += [{**failure, "stage": identity(stage)} for failure in column["failures"]]
    return found
