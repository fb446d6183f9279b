"""`lorary reproduce`: a study from its configuration file, stage by stage, into one report. Run again, it goes on.

A stage has a key: the hash of its settings, of its tasks' data, of the base, and of what the stages that it reads have
made. A stage that is done and whose key and results are the same is not done again; one that was killed goes on through
the ledgers of builds and evaluations; one that fails leaves the others to run that do not need it.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorary.errors import LoraryError, UsageError
from lorary.library.lock import study_lock
from lorary.ops.memory import is_out_of_memory
from lorary.study.adapting import run_adapt_stage
from lorary.study.building import run_build_stage, set_aside
from lorary.study.config import AdaptStage, BuildStage, EvaluateStage, Stage, Study, identity
from lorary.study.context import OutOfTime, StudyContext, TimedDisplay
from lorary.study.drift import run_drift_stage
from lorary.study.dry_run import dry_run
from lorary.study.parse import read_study
from lorary.study.record import DONE, FAILED, RUNNING, Record, read_record, write_record
from lorary.study.report import write_study_report
from lorary.study.scoring import run_evaluate_stage
from lorary.study.up_to_date import current_key, is_done, outputs_of

REPORT = "report"
SKIPPED, WAITING, LEFT = "skipped", "waiting", "left"


@dataclass(frozen=True)
class StageChoice:
    """Which stages to run.

    Args:
        only: identities (`build:private`), kinds (`build`) or `report`; all where None.
        until: the last stage to run, by its identity.
    """

    only: tuple[str, ...] | None = None
    until: str | None = None

    def of(self, study: Study) -> list[Stage]:
        """The stages chosen, in the study's order.

        Raises:
            UsageError: if one is named that is not there.
        """
        names = [identity(stage) for stage in study.stages]
        valid = {*names, *(stage.kind for stage in study.stages), REPORT}
        requested = [*(self.only or ()), *([self.until] if self.until else ())]
        if unknown := [name for name in requested if name not in valid]:
            raise UsageError(f"--only and --until must name stages of study '{study.name}'", found=unknown[0],
                             remedy=f"it has {', '.join(names)}, {REPORT}")  # fmt: skip
        if self.until is not None and self.until not in names:
            raise UsageError("--until must name one stage", found=self.until, remedy=f"one of {', '.join(names)}")
        last = len(names) if self.until is None else names.index(self.until) + 1
        return [
            stage
            for stage in study.stages[:last]
            if self.only is None or identity(stage) in self.only or stage.kind in self.only
        ]


@dataclass(frozen=True)
class ReproduceResult:
    """What a run of a study did.

    Args:
        study: its name.
        out: its folder.
        stages: how each stage stands: `done` by this run, `skipped` since it was done before, `failed`, `waiting` for
            one that is not done, or `left` for want of time or because it was not asked for.
        report: the page; the same lies beside it as .md and .json.
        document: the content of report.json.
    """

    study: str
    out: str
    stages: dict[str, str]
    report: str
    document: Mapping[str, Any]

    @property
    def failed(self) -> list[str]:
        """Stages that failed."""
        return [name for name, state in self.stages.items() if state == FAILED]


def run_reproduce(
    reference: str,
    out: str | None = None,
    *,
    choice: StageChoice | None = None,
    tasks: str | None = None,
    time_budget_s: float | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> ReproduceResult:
    """Run a study, or go on with it, and write its report.

    Args:
        reference: a study that comes with Lorary, or a YAML file.
        out: its folder; one of its name where None.
        choice: which stages.
        tasks: folder of the tasks that the study does not name.
        time_budget_s: no stage, no step of a training and no cell is begun after that long; the report is written
            all the same.
        device: where to run; the study's own where None.
        dtype: of the base; the study's own where None.

    Returns:
        How each stage stands.

    Raises:
        UsageError: if the study, a stage or the tasks are not there.
        LibraryError: if another run holds the folder.
    """
    context = open_study(reference, out, tasks=tasks, device=device, dtype=dtype)
    chosen = (choice or StageChoice()).of(context.study)
    context.display.deadline = None if time_budget_s is None else time.monotonic() + time_budget_s
    _check_tasks(context, chosen)
    with study_lock(context.out):
        stages = _run_stages(context, chosen)
        document = write_study_report(context, stages)
    return ReproduceResult(context.study.name, str(context.out), stages, str(context.out / "report.html"), document)


def run_dry_run(
    reference: str, out: str | None = None, *, choice: StageChoice | None = None, tasks: str | None = None
) -> dict[str, Any]:
    """Say what a study takes, offline, and write nothing; arguments as for `run_reproduce`.

    Returns:
        The document of `lorary.study.dry_run.dry_run`.
    """
    context = open_study(reference, out, tasks=tasks)
    return dry_run(context, (choice or StageChoice()).of(context.study))


def open_study(
    reference: str, out: str | None, *, tasks: str | None = None, device: str | None = None, dtype: str | None = None
) -> StudyContext:
    """A study, read, at its folder; arguments as for `run_reproduce`."""
    study = read_study(reference)
    run = replace(study.run, device=device or study.run.device, dtype=dtype or study.run.dtype)
    folder = Path(study.name if out is None else out)
    try:
        is_file = folder.exists() and not folder.is_dir()
    except OSError as error:
        raise UsageError("--out must be a folder", found=error.strerror) from error
    if is_file:
        raise UsageError("--out must be a folder", found=f"'{folder}' is a file")
    options = "".join(f" --{key} {value}" for key, value in (("device", device), ("dtype", dtype)) if value)
    return StudyContext(replace(study, run=run), folder, tasks, options, TimedDisplay())


def _check_tasks(context: StudyContext, chosen: Sequence[Stage]) -> None:
    """Load the tasks that stages share: where they cannot be read, all would fail of one cause."""
    if any(isinstance(stage, BuildStage) for stage in chosen):
        context.listed(context.study.train)
    if any(isinstance(stage, (EvaluateStage, AdaptStage)) for stage in chosen):
        _ = context.held_out_tasks


def _run_stages(context: StudyContext, chosen: Sequence[Stage]) -> dict[str, str]:
    states: dict[str, str] = {}
    is_over = False
    for number, stage in enumerate(context.study.stages):
        name, title = identity(stage), f"stage {number + 1}/{len(context.study.stages)} {identity(stage)}"
        before = read_record(context.out, name)
        try:
            key = current_key(context, stage) if stage in chosen or before else None
            is_there = key is not None and is_done(context, stage, key)
        except LoraryError as error:
            # The key stays: what the stage has made is still its own once the cause is gone.
            record = before or Record(name, "", RUNNING, {})
            states[name] = _failed(context, record, error) if stage in chosen else LEFT
            continue
        if is_there:
            states[name] = SKIPPED
            if stage in chosen:
                context.display.say(f"{title}: done before")
        elif stage not in chosen or is_over:
            states[name] = LEFT
        elif key is None:
            states[name] = WAITING
            context.display.say(f"{title}: waits for {', '.join(stage.needs)}")
        else:
            context.display.say(title)
            states[name] = _run_stage(context, stage, key)
            is_over = states[name] == LEFT
    return states


def _run_stage(context: StudyContext, stage: Stage, key: str) -> str:
    """Do a stage; returns its state. A kill leaves the record `running`, so that the next run does it again."""
    name, started = identity(stage), time.monotonic()
    before, record = read_record(context.out, name), Record(name, key, RUNNING, {})
    try:
        context.display.check_time()
        if isinstance(stage, BuildStage) and before is not None and before.key != key:
            set_aside(context, stage)
        write_record(context.out, record)
        note = _do(context, stage, key)
    except OutOfTime:
        context.display.say("  out of time: what is finished is kept")
        return LEFT
    except (LoraryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, LoraryError) and not is_out_of_memory(error):
            raise
        return _failed(context, record, error)
    seconds = time.monotonic() - started
    write_record(
        context.out, replace(record, status=DONE, outputs=outputs_of(context, stage), seconds=seconds, note=note)
    )
    context.display.say(f"  {note}, {seconds:.0f} s")
    return DONE


def _failed(context: StudyContext, record: Record, error: Exception) -> str:
    write_record(context.out, replace(record, status=FAILED, error=str(error)))
    context.display.say(f"  {record.stage} failed: {error}")
    return FAILED


def _do(context: StudyContext, stage: Stage, key: str) -> str:
    if isinstance(stage, BuildStage):
        return run_build_stage(context, stage)
    if isinstance(stage, EvaluateStage):
        return run_evaluate_stage(context, stage, key)
    if isinstance(stage, AdaptStage):
        return run_adapt_stage(context, stage, key)
    return run_drift_stage(context, stage, key)
