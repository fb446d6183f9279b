"""How the stages of a study stand: whether what lies there was made by the settings, data and libraries of now."""

from typing import Any

from lorary.errors import LoraryError
from lorary.study.adapting import adapt_inputs
from lorary.study.building import build_inputs, build_outputs
from lorary.study.config import AdaptStage, BuildStage, EvaluateStage, Stage, identity
from lorary.study.context import StudyContext
from lorary.study.record import DONE, read_record, stage_key
from lorary.study.scoring import evaluate_inputs, file_outputs


def current_key(context: StudyContext, stage: Stage) -> str | None:
    """The key of a stage as things are; None while a stage that it reads is not done.

    Raises:
        LoraryError: if the stage cannot be: its tasks are not there, or lack rows.
    """
    upstream = {}
    for name in stage.needs:
        before = context.study.stage(name)
        key = current_key(context, before)
        if key is None or not is_done(context, before, key):
            return None
        upstream[name] = outputs_of(context, before)
    return stage_key(stage=identity(stage), inputs=_inputs(context, stage), upstream=upstream)


def known_keys(context: StudyContext) -> dict[str, str | None]:
    """The key of every stage, by its identity; None also for one that cannot be."""
    keys: dict[str, str | None] = {}
    for stage in context.study.stages:
        try:
            keys[identity(stage)] = current_key(context, stage)
        except LoraryError:
            keys[identity(stage)] = None
    return keys


def is_done(context: StudyContext, stage: Stage, key: str) -> bool:
    """Whether a stage was done with this key, and what it made is still there, unchanged."""
    record = read_record(context.out, identity(stage))
    if record is None or record.status != DONE or record.key != key:
        return False
    return dict(record.outputs) == outputs_of(context, stage)


def outputs_of(context: StudyContext, stage: Stage) -> dict[str, str]:
    """Hashes of what a stage has made, as it lies there now."""
    return build_outputs(context, stage) if isinstance(stage, BuildStage) else file_outputs(context, stage)


def _inputs(context: StudyContext, stage: Stage) -> dict[str, Any]:
    if isinstance(stage, BuildStage):
        return build_inputs(context, stage)
    if isinstance(stage, EvaluateStage):
        return evaluate_inputs(context, stage)
    if isinstance(stage, AdaptStage):
        return adapt_inputs(context, stage)
    return {"k": stage.k, "seed": stage.seed}
