"""A study's YAML file as frozen dataclasses; whatever is wrong with it is said by place, value and remedy."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from lorary.build.methods import MethodSettings, method_settings
from lorary.build.settings import BuildSettings, RunSettings, preset
from lorary.data.strict_yaml import MAX_BYTES, strict_yaml
from lorary.errors import UsageError
from lorary.evaluate.settings import EvaluateSettings
from lorary.library.folders import check_name
from lorary.reading import read_regular
from lorary.study.checks import check_study
from lorary.study.config import (
    SUBSET,
    AdaptStage,
    BuildStage,
    DriftStage,
    EvaluateStage,
    Stage,
    Study,
    TaskSet,
)
from lorary.study.question import Question
from lorary.study.values import check_keys, fields_for

KEYS = ("about", "base", "tasks", "train", "run", "evaluate", "stages", "questions", "assume")
KINDS = {"evaluate": EvaluateStage, "adapt": AdaptStage, "drift": DriftStage}
SHIPPED = ("builtin-quick", "suite-cpu", "paper-phi2", "paper-mistral")


@dataclass(frozen=True)
class _Build:
    """A build as the file writes it: the options of `lorary build`, by their names there."""

    method: str = "private"
    tasks: int | tuple[str, ...] | None = None
    train: Mapping[str, Any] = field(default_factory=dict)
    of: str | None = None
    data: str | None = None
    k: int | None = None
    cluster_by: str | None = None
    cluster_method: str | None = None
    cluster_seed: int | None = None
    private: str | None = None
    private_steps: int | None = None
    private_epochs: float | None = None
    skills: int | None = None
    splits: int | None = None
    logits_learning_rate: float | None = None
    mu: bool = False
    per_task: bool = False


def read_study(reference: str) -> Study:
    """Read a study by name or file.

    Args:
        reference: one of `SHIPPED`, or a YAML file.

    Returns:
        The study.

    Raises:
        UsageError: if there is none, or it does not follow the format.
    """
    if reference in SHIPPED:
        text = (files("lorary.study") / f"{reference}.yaml").read_text(encoding="utf-8")
    else:
        try:
            text = read_regular(Path(reference), max_bytes=4 * MAX_BYTES).decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                "the study must be a YAML file, or one that comes with Lorary",
                found=f"{reference} ({getattr(error, 'strerror', error)})",
                remedy=f"one of {', '.join(SHIPPED)}, or a file's path",
            ) from error
    return parse_study(text, reference)


def parse_study(text: str, source: str) -> Study:
    """Parse a study.

    Args:
        text: the file.
        source: what it was read by; the study is called by the file's name without its ending.

    Raises:
        UsageError: if it does not follow the format.
    """
    name = source if source in SHIPPED else Path(source).stem
    document = check_keys(strict_yaml(text, f"study '{name}'"), KEYS, f"study '{name}'")
    tasks = check_keys(document.get("tasks"), ("train", "held_out"), "tasks")
    if "train" not in tasks or not document.get("stages"):
        raise UsageError(f"study '{name}' must have tasks.train and stages", found=f"keys {', '.join(document)}")
    held_out = tasks.get("held_out", [])
    sets = _listed([held_out] if isinstance(held_out, Mapping) else held_out, "tasks.held_out")
    shared, scoring = document.get("train", {}), document.get("evaluate", {})
    # What all stages share is checked before it is merged into them, so that an error names its place in the file.
    _settings(_mapping(shared, "train"), f"study '{name}'")
    _scoring({}, scoring, f"study '{name}', evaluate,")
    stages = tuple(
        _stage(entry, f"stages[{number}]", shared, scoring)
        for number, entry in enumerate(_listed(document["stages"], "stages"))
    )
    asked = enumerate(_listed(document.get("questions", []), "questions"))
    study = Study(
        name=name,
        source=source,
        about=str(document.get("about", "")).strip(),
        base=str(document.get("base", "embedded")),
        train=_task_set(tasks["train"], "tasks.train"),
        held_out=tuple(_task_set(entry, f"tasks.held_out[{number}]") for number, entry in enumerate(sets)),
        stages=stages,
        questions=tuple(_question(entry, f"questions[{number}]") for number, entry in asked),
        run=RunSettings(**fields_for(RunSettings, document.get("run", {}), "run")),
        assume=check_keys(document.get("assume", {}), ("model", "dtype_bytes", "tflops"), "assume"),
    )
    check_study(study)
    return study


def _listed(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise UsageError(f"{where} must be a list", found=repr(value)[:80])
    return value


def _task_set(entry: object, where: str) -> TaskSet:
    return TaskSet(**fields_for(TaskSet, entry, where))


def _stage(entry: object, where: str, shared: object, scoring: object) -> Stage:
    kinds = [kind for kind in ("build", *KINDS) if isinstance(entry, Mapping) and kind in entry]
    if not isinstance(entry, Mapping) or len(kinds) != 1:
        raise UsageError(
            f"{where} must have one of the keys build, evaluate, adapt, drift, with the stage's name",
            found=", ".join(map(str, entry)) if isinstance(entry, Mapping) else repr(entry)[:80],
        )
    kind, name = kinds[0], entry[kinds[0]]
    rest = {key: value for key, value in entry.items() if key != kind}
    where = f"{where} ({kind}: {name})"
    if not isinstance(name, str):
        raise UsageError(f"{where} must have a name", found=repr(name))
    check_name(name)
    try:
        if kind == "build":
            return _build(name, rest, where, shared)
        if kind == "evaluate":
            rest = {**rest, "settings": _scoring(scoring, rest.get("settings", {}), f"{where}, settings,")}
        if kind == "adapt":
            return _adapt(name, rest, where, shared, scoring)
        cls: Any = KINDS[kind]
        return _made(cls, name, fields_for(cls, rest, where, leave_out=("name",)), where)
    except UsageError as error:
        if where in error.rule:
            raise
        raise UsageError(f"{where}: {error.rule}", found=error.found, remedy=error.remedy) from error


def _adapt(name: str, entry: Mapping[str, Any], where: str, shared: object, scoring: object) -> AdaptStage:
    own = _mapping(entry.get("train", {}), f"{where}, train,")
    train = _settings(_over(_mapping(shared, "train"), own), where)
    rest = {key: value for key, value in entry.items() if key != "train"}
    rest["evaluate"] = _scoring(scoring, rest.get("evaluate", {}), f"{where}, evaluate,")
    told = fields_for(AdaptStage, rest, where, leave_out=("name", "train"))
    made: AdaptStage = _made(AdaptStage, name, {**told, "train": train}, where)
    return made


def _scoring(shared: object, own: object, where: str) -> dict[str, Any]:
    """Fields of `EvaluateSettings` of one stage over those of all."""
    given = {**_mapping(shared, "evaluate"), **_mapping(own, where)}
    return fields_for(EvaluateSettings, given, where, leave_out=("routers", "rows", "units"))


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UsageError(f"{where} must be a mapping", found=repr(value)[:80])
    return value


def _made(cls: Any, name: str | None, given: Mapping[str, Any], where: str) -> Any:
    arguments = {**given, **({} if name is None else {"name": name})}
    needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [key for key in needed if key not in arguments]:
        raise UsageError(f"{where} must say {', '.join(missing)}", found="nothing of the kind")
    return cls(**arguments)


def _build(name: str, entry: Mapping[str, Any], where: str, shared: object) -> BuildStage:
    asked = _Build(**fields_for(_Build, entry, where))
    is_subset = asked.method == SUBSET
    if is_subset != (asked.of is not None):
        raise UsageError(f"{where}: 'of' belongs to method {SUBSET}", found=f"method {asked.method}, of {asked.of}")
    given = _over(_mapping(shared, "train"), asked.train)
    return BuildStage(
        name=name,
        settings=_settings(given, where),
        method=MethodSettings() if is_subset else _method(asked, str(given.get("preset", "default"))),
        tasks=asked.tasks,
        private=asked.private,
        of=asked.of,
        data=asked.data,
    )


def _question(entry: object, where: str) -> Question:
    found: Question = _made(Question, None, fields_for(Question, entry, where), where)
    return found


def _over(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A library's settings over those of all: its epochs take the place of steps, and the other way round."""
    replaced = {"steps", "epochs"} if {"steps", "epochs"} & set(own) else set()
    return {**{key: value for key, value in shared.items() if key not in replaced}, **own}


def _settings(given: Mapping[str, Any], where: str) -> BuildSettings:
    named = {key: value for key, value in given.items() if key != "preset"}
    return preset(str(given.get("preset", "default")), **fields_for(BuildSettings, named, f"{where}, train,"))


def _method(asked: _Build, preset_name: str) -> MethodSettings:
    return method_settings(
        asked.method,
        preset_name,
        None,
        mbc={
            "k": None if asked.k is None else str(asked.k),
            "by": asked.cluster_by,
            "method": asked.cluster_method,
            "seed": asked.cluster_seed,
            "private": asked.private,
            "private_steps": asked.private_steps,
            "private_epochs": asked.private_epochs,
        },
        poly={"skills": asked.skills, "splits": asked.splits, "logits_learning_rate": asked.logits_learning_rate},
        mu=asked.mu,
        per_task=asked.per_task,
    )
