"""How the stages of a study stand: whether what lies there was made by the settings, data and libraries of now."""

from typing import Any

from lorary.errors import LoraryError
from lorary.study.adapting import adapt_inputs
from lorary.study.building import build_inputs, build_outputs
from lorary.study.config import AdaptStage, BuildStage, EvaluateStage, Stage, identity
from lorary.study.context import Place
from lorary.study.record import DONE, read_record, stage_key
from lorary.study.scoring import evaluate_inputs, file_outputs


def current_key(place: Place, stage: Stage) -> str | None:
    """The key of a stage as things are; None while a stage that it reads is not done.

    Raises:
        LoraryError: if the stage cannot be: its tasks are not there, or lack rows.
    """
    upstream = {}
    for name in stage.needs:
        before = place.study.stage(name)
        key = current_key(place, before)
        if key is None or not is_done(place, before, key):
            return None
        upstream[name] = outputs_of(place, before)
    return stage_key(stage=identity(stage), inputs=_inputs(place, stage), upstream=upstream)


def known_keys(place: Place) -> dict[str, str | None]:
    """The key of every stage, by its identity; None also for one that cannot be."""
    found: dict[str, str | None] = {}
    for stage in place.study.stages:
        try:
            found[identity(stage)] = current_key(place, stage)
        except LoraryError:
            found[identity(stage)] = None
    return found


def is_done(place: Place, stage: Stage, key: str) -> bool:
    """Whether a stage was done with this key, and what it made is still there, unchanged."""
    record = read_record(place.out, identity(stage))
    if record is None or record.status != DONE or record.key != key:
        return False
    return dict(record.outputs) == outputs_of(place, stage)


def outputs_of(place: Place, stage: Stage) -> dict[str, str]:
    """Hashes of what a stage has made, as it lies there now."""
    return build_outputs(place, stage) if isinstance(stage, BuildStage) else file_outputs(place, stage)


def _inputs(place: Place, stage: Stage) -> dict[str, Any]:
    if isinstance(stage, BuildStage):
        return build_inputs(place, stage)
    if isinstance(stage, EvaluateStage):
        return evaluate_inputs(place, stage)
    if isinstance(stage, AdaptStage):
        return adapt_inputs(place, stage)
    return {"k": stage.k, "seed": stage.seed}
