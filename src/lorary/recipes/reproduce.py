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
from lorary.evaluate.scorer import is_out_of_memory
from lorary.library.lock import study_lock
from lorary.study.adapting import run_adapt_stage
from lorary.study.building import run_build_stage, set_aside
from lorary.study.config import AdaptStage, BuildStage, EvaluateStage, Stage, Study, identity
from lorary.study.context import OutOfTime, Place, TimedDisplay
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
class Choice:
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
        known = {*names, *(stage.kind for stage in study.stages), REPORT}
        asked = [*(self.only or ()), *([self.until] if self.until else ())]
        if unknown := [name for name in asked if name not in known]:
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
    choice: Choice | None = None,
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
    place = open_place(reference, out, tasks=tasks, device=device, dtype=dtype)
    chosen = (choice or Choice()).of(place.study)
    place.display.deadline = None if time_budget_s is None else time.monotonic() + time_budget_s
    _check_tasks(place, chosen)
    with study_lock(place.out):
        stages = _run_stages(place, chosen)
        document = write_study_report(place, stages)
    return ReproduceResult(place.study.name, str(place.out), stages, str(place.out / "report.html"), document)


def run_dry_run(
    reference: str, out: str | None = None, *, choice: Choice | None = None, tasks: str | None = None
) -> dict[str, Any]:
    """Say what a study takes, offline, and write nothing; arguments as for `run_reproduce`.

    Returns:
        The document of `lorary.study.dry_run.dry_run`.
    """
    place = open_place(reference, out, tasks=tasks)
    return dry_run(place, (choice or Choice()).of(place.study))


def open_place(
    reference: str, out: str | None, *, tasks: str | None = None, device: str | None = None, dtype: str | None = None
) -> Place:
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
    return Place(replace(study, run=run), folder, tasks, options, TimedDisplay())


def _check_tasks(place: Place, chosen: Sequence[Stage]) -> None:
    """Load the tasks that stages share: where they cannot be read, all would fail of one cause."""
    if any(isinstance(stage, BuildStage) for stage in chosen):
        place.listed(place.study.train)
    if any(isinstance(stage, (EvaluateStage, AdaptStage)) for stage in chosen):
        _ = place.held_out_tasks


def _run_stages(place: Place, chosen: Sequence[Stage]) -> dict[str, str]:
    states: dict[str, str] = {}
    is_over = False
    for number, stage in enumerate(place.study.stages):
        name, title = identity(stage), f"stage {number + 1}/{len(place.study.stages)} {identity(stage)}"
        before = read_record(place.out, name)
        try:
            key = current_key(place, stage) if stage in chosen or before else None
            is_there = key is not None and is_done(place, stage, key)
        except LoraryError as error:
            # The key stays: what the stage has made is still its own once the cause is gone.
            record = before or Record(name, "", RUNNING, {})
            states[name] = _failed(place, record, error) if stage in chosen else LEFT
            continue
        if is_there:
            states[name] = SKIPPED
            if stage in chosen:
                place.display.say(f"{title}: done before")
        elif stage not in chosen or is_over:
            states[name] = LEFT
        elif key is None:
            states[name] = WAITING
            place.display.say(f"{title}: waits for {', '.join(stage.needs)}")
        else:
            place.display.say(title)
            states[name] = _run_stage(place, stage, key)
            is_over = states[name] == LEFT
    return states


def _run_stage(place: Place, stage: Stage, key: str) -> str:
    """Do a stage; returns its state. A kill leaves the record `running`, so that the next run does it again."""
    name, started = identity(stage), time.monotonic()
    before, record = read_record(place.out, name), Record(name, key, RUNNING, {})
    try:
        place.display.check_time()
        if isinstance(stage, BuildStage) and before is not None and before.key != key:
            set_aside(place, stage)
        write_record(place.out, record)
        note = _do(place, stage, key)
    except OutOfTime:
        place.display.say("  out of time: what is finished is kept")
        return LEFT
    except (LoraryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, LoraryError) and not is_out_of_memory(error):
            raise
        return _failed(place, record, error)
    seconds = time.monotonic() - started
    write_record(place.out, replace(record, status=DONE, outputs=outputs_of(place, stage), seconds=seconds, note=note))
    place.display.say(f"  {note}, {seconds:.0f} s")
    return DONE


def _failed(place: Place, record: Record, error: Exception) -> str:
    write_record(place.out, replace(record, status=FAILED, error=str(error)))
    place.display.say(f"  {record.stage} failed: {error}")
    return FAILED


def _do(place: Place, stage: Stage, key: str) -> str:
    if isinstance(stage, BuildStage):
        return run_build_stage(place, stage)
    if isinstance(stage, EvaluateStage):
        return run_evaluate_stage(place, stage, key)
    if isinstance(stage, AdaptStage):
        return run_adapt_stage(place, stage, key)
    return run_drift_stage(place, stage, key)
