"""The report of a study, from what is there: report.json, and the same for readers as report.md and report.html."""

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from shlex import quote
from typing import Any

from markupsafe import Markup

from lorary.errors import LibraryError, LoraryError
from lorary.evaluate.cells import is_base
from lorary.evaluate.compare import Columns as ComparedColumns
from lorary.evaluate.settings import EvaluateSettings
from lorary.library.files import replace_file, reported
from lorary.library.store import Library
from lorary.report.shell import page_html, write_page
from lorary.route.spec import REFERENCES
from lorary.study.answers import StudyColumn, answer
from lorary.study.building import command_of
from lorary.study.columns import (
    cell_documents,
    compared_columns,
    failure_documents,
    left_out_tasks,
    owed_cells,
    scored_columns,
)
from lorary.study.config import SUBSET, AdaptStage, BuildStage, EvaluateStage, Stage, identity
from lorary.study.context import StudyContext
from lorary.study.plots import study_plots
from lorary.study.record import FAILED, Record, read_record, stage_key, write_document
from lorary.study.render import html_sections, markdown
from lorary.study.scoring import Columns
from lorary.study.shared_rows import shared_lines
from lorary.study.up_to_date import known_keys

SCRIPTS = ("core.js", "svg.js", "axes.js", "grid.js", "sweep.js", "gap.js", "heat.js", "study.js", "listen.js")
PACKAGES = ("lorary", "torch", "transformers", "peft", "scikit-learn", "numpy")


def write_study_report(context: StudyContext, states: Mapping[str, str]) -> dict[str, Any]:
    """Write the three files into the study's folder.

    Returns:
        The content of report.json.

    Raises:
        LibraryError: if the folder cannot be written.
    """
    document = report_document(context, states)
    write_document(context.out / "report.json", document)
    text = markdown(document).encode()
    with reported(context.out):
        replace_file(context.out / "report.md", text, context.out / "report.md.tmp")
    title, styles = f"Study {context.study.name}: questions and answers", ("style.css", "study.css")
    plots = study_plots(document)
    page = page_html(
        title,
        _facts(document),
        [(key, name, Markup(html)) for key, name, html in html_sections(document, plots)],
        plots,
        scripts=SCRIPTS,
        styles=styles,
    )
    write_page(context.out / "report.html", page)
    return document


def report_document(context: StudyContext, states: Mapping[str, str]) -> dict[str, Any]:
    """Everything that the study knows now."""
    keys = known_keys(context)
    scored, drift = scored_columns(context, keys)
    columns, owed = compared_columns(context, scored), owed_cells(context)
    return {
        "study": context.study.name,
        "about": context.study.about,
        "base": context.study.base,
        "command": command(context),
        "stages": [_stage_row(context, stage, states, keys) for stage in context.study.stages],
        "libraries": [row for stage in context.study.stages
                      if isinstance(stage, BuildStage) and (row := _library_row(context, stage, keys))],
        "columns": [_column_row(context, column) for column in columns],
        "answers": [asdict(answer(question, columns, drift, owed)) for question in context.study.questions],
        "drift": drift,
        "overlap": shared_lines(context),
        "unfinished": _unfinished(context, states, scored),
        "cells": cell_documents(context, scored),
        "failures": failure_documents(context, scored),
        "left_out": left_out_tasks(columns),
        "environment": environment(),
    }  # fmt: skip


def command(context: StudyContext, stage: str | None = None) -> str:
    """The command that makes the study, or one of its stages."""
    tasks = f" --tasks {quote(context.tasks_folder)}" if context.tasks_folder else ""
    only = f" --only {stage}" if stage else ""
    return (
        f"lorary reproduce {quote(context.study.source)} --out {quote(str(context.out))}{tasks}{context.options}{only}"
    )


def environment() -> dict[str, str]:
    """Machine and versions."""
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def _column_row(context: StudyContext, column: StudyColumn) -> dict[str, Any]:
    groups = column.values
    figure = asdict(ComparedColumns({column.cell: groups}).mean(column.cell, sorted(groups)))
    questions = {task: [*column.questions[task], len(values)] for task, values in groups.items()}
    return {
        "library": column.library,
        "router": column.router,
        "split": column.split,
        "stage": column.stage,
        "value": figure.pop("mean"),
        **figure,
        "rows": sum(map(len, groups.values())),
        "left_out": list(column.left_out),
        "setting": _setting(context, column),
        # Columns of which this is the same were asked the same.
        "asked": stage_key(asked=questions)[:12],
    }


def _setting(context: StudyContext, column: StudyColumn) -> dict[str, Any] | None:
    """All that its router was asked for; None for the oracle, the base, and what is no router."""
    stage = context.study.stage(column.stage)
    if not isinstance(stage, EvaluateStage) or column.router in REFERENCES or is_base(column.router):
        return None
    return EvaluateSettings(routers=(column.router,), **stage.settings).setting(column.router).to_json()


def _stage_row(
    context: StudyContext, stage: Stage, states: Mapping[str, str], keys: Mapping[str, str | None]
) -> dict[str, Any]:
    state = states.get(identity(stage), "left")
    record = _record(context, stage, keys) if state != FAILED else read_record(context.out, identity(stage))
    return {
        "stage": identity(stage),
        "state": state,
        "seconds": record.seconds if record else None,
        "note": record.note if record else "",
        "error": record.error if record else "",
        "command": command(context, identity(stage)),
        "plain": _plain(context, stage) if isinstance(stage, BuildStage) and state != FAILED else None,
    }


def _record(context: StudyContext, stage: Stage, keys: Mapping[str, str | None]) -> Record | None:
    """The record of a stage; None where other settings, data or libraries than those of now made it."""
    record = read_record(context.out, identity(stage))
    return record if record and record.key == keys[identity(stage)] else None


def _plain(context: StudyContext, stage: BuildStage) -> str | None:
    """The plain command that makes the library; None without one, or without its tasks."""
    try:
        return command_of(context, stage)
    except LoraryError:
        return None


def _library_row(context: StudyContext, stage: BuildStage, keys: Mapping[str, str | None]) -> dict[str, Any] | None:
    """What a library was trained on: libraries are compared fairly where these agree."""
    if _record(context, stage, keys) is None:
        return None
    try:
        library = Library.open(context.library(stage.name))
        records = [library.provenance(name) for name in library.names()]
    except LibraryError:
        return None
    trained = [record for record in records if record.get("metrics")]
    if stage.method.is_poly:
        trained = trained[:1]  # its skills were trained together, and each tells of all
    steps = [int(record["metrics"]["val_losses"][-1][0]) for record in trained]
    examples = sum(n * record["settings"]["batch_size"] for n, record in zip(steps, trained, strict=True))
    return {
        "library": stage.name,
        "method": SUBSET if stage.of else stage.method.method,
        "clustered_by": stage.method.clusters.by if stage.method.method == "mbc" else None,
        "tasks": len({task for record in records for task in record["tasks"]}),
        "experts": len(records),
        "ranks": sorted({int(record["rank"]) for record in records}),
        "steps": sum(steps),
        "examples": examples,
        "parameters": sum(int(record["num_parameters"]) for record in records),
        "stage": identity(stage),
    }


def _unfinished(
    context: StudyContext, states: Mapping[str, str], scored: Mapping[str, Columns]
) -> list[dict[str, Any]]:
    """Stages that are not done, with the columns that they still owe."""
    rows = []
    for stage in context.study.stages:
        state = states.get(identity(stage), "left")
        if state in ("done", "skipped"):
            continue
        columns = scored.get(identity(stage), {})
        runs = stage.runs() if isinstance(stage, (EvaluateStage, AdaptStage)) else []
        owed = [f"{library}/{router} {split}" for library, router, split in runs
                if (library, router, split) not in columns or columns[library, router, split]["failures"]]  # fmt: skip
        rows.append({"stage": identity(stage), "state": state, "columns": owed})
    return rows


def _facts(document: Mapping[str, Any]) -> dict[str, str]:
    done = sum(row["state"] in ("done", "skipped") for row in document["stages"])
    return {
        "base model": document["base"],
        "stages": f"{done} of {len(document['stages'])} done",
        "command": document["command"],
        "machine": document["environment"]["machine"],
    }
