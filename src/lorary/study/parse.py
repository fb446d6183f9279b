"""A study's YAML file as frozen dataclasses; whatever is wrong with it is said by place, value and remedy."""

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Union

from pydantic import BeforeValidator, Discriminator, Strict, Tag

from lorary.build.methods import MethodSettings, method_settings
from lorary.build.settings import BuildSettings, RunSettings, preset
from lorary.data.schema import SPLITS
from lorary.data.strict_yaml import MAX_BYTES, strict_yaml
from lorary.errors import UsageError
from lorary.evaluate.settings import EvaluateSettings
from lorary.library.folders import check_name
from lorary.reading import read_regular
from lorary.study.checks import check_study
from lorary.study.config import SUBSET, AdaptStage, BuildStage, DriftStage, EvaluateStage, Stage, Study, TaskSet
from lorary.study.question import Question
from lorary.study.values import POSITIVE, mapping_for, mapping_of, stage_kinds, stage_title, validated

SHIPPED = ("builtin-quick", "suite-cpu", "paper-phi2", "paper-mistral")
# Keys of a build that are options of clusters, with their names in `ClusterSettings`.
CLUSTERS = {
    "k": "k", "cluster_by": "by", "cluster_method": "method", "cluster_seed": "seed", "private": "private",
    "private_steps": "private_steps", "private_epochs": "private_epochs",
}  # fmt: skip
POLY = ("skills", "splits", "logits_learning_rate")


@cache
def _file_type() -> Any:
    """What a study's file may hold."""
    train = mapping_for(BuildSettings, preset=str)
    scoring = mapping_for(EvaluateSettings, ("routers", "rows", "units"))
    counted = ("tasks", "rows", *(f"{split}_rows" for split in SPLITS), "tokens")
    task_set = mapping_for(TaskSet, assume=mapping_of("assumed", **dict.fromkeys(counted, POSITIVE)))
    stages = {
        # As the options of `lorary build`, by their names there.
        "build": mapping_of(
            "build", build=str, method=str, tasks=int | tuple[str, ...] | None, train=train, of=str | None,
            data=str | None, mu=bool, per_task=bool, k=int | None, cluster_by=str | None, cluster_method=str | None,
            cluster_seed=int | None, private=str | None, private_steps=int | None, private_epochs=float | None,
            skills=int | None, splits=int | None, logits_learning_rate=float | None,
        ),
        "evaluate": mapping_for(EvaluateStage, ("name",), evaluate=str, settings=scoring),
        "adapt": mapping_for(AdaptStage, ("name",), adapt=str, train=train, evaluate=scoring),
        "drift": mapping_for(DriftStage, ("name",), drift=str),
    }  # fmt: skip
    tagged = tuple(Annotated[kind, Tag(f"stage {name}")] for name, kind in stages.items())
    stage = Annotated[Union[tagged], Discriminator(_stage_tag)]  # type: ignore[valid-type]  # noqa: UP007
    listed = BeforeValidator(lambda sets: [sets] if isinstance(sets, Mapping) else sets)
    return mapping_of(
        "study",
        about=str,
        base=str,
        tasks=mapping_of("tasks", train=task_set, held_out=Annotated[list[task_set], Strict(), listed]),  # type: ignore[valid-type]
        train=train,
        run=mapping_for(RunSettings),
        evaluate=scoring,
        stages=Annotated[list[stage], Strict()],
        questions=tuple[mapping_for(Question), ...],  # type: ignore[misc]
        assume=mapping_of("assume", model=Mapping[str, Any], dtype_bytes=POSITIVE, tflops=POSITIVE),
    )


def _stage_tag(entry: object) -> str | None:
    kinds = stage_kinds(entry)
    return f"stage {kinds[0]}" if len(kinds) == 1 else None


def read_study(reference: str) -> Study:
    """Read a study by name or file.

    Args:
        reference: one of `SHIPPED`, or a YAML file.

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
    try:
        return _parse(text, source, name)
    except UsageError as error:
        rule = error.rule if f"study '{name}'" in error.rule else f"study '{name}': {error.rule}"
        raise UsageError(rule, found=error.found, remedy=error.remedy) from error


def _parse(text: str, source: str, name: str) -> Study:
    document = validated(_file_type(), strict_yaml(text, f"study '{name}'"), f"study '{name}'")
    tasks, shared, scoring = document.get("tasks", {}), document.get("train", {}), document.get("evaluate", {})
    if "train" not in tasks or not document.get("stages"):
        raise UsageError(f"study '{name}' must have tasks.train and stages", found=f"keys {', '.join(document)}")
    # What all stages share is checked before it is merged into them, so that an error blames no stage.
    _settings(shared)
    study = Study(
        name=name,
        source=source,
        about=document.get("about", "").strip(),
        base=document.get("base", "embedded"),
        train=TaskSet(**tasks["train"]),
        held_out=tuple(TaskSet(**chosen) for chosen in tasks.get("held_out", [])),
        stages=tuple(_stage(entry, number, shared, scoring) for number, entry in enumerate(document["stages"])),
        questions=tuple(Question(**fields) for fields in document.get("questions", ())),
        run=RunSettings(**document.get("run", {})),
        assume=document.get("assume", {}),
    )
    check_study(study)
    return study


def _stage(entry: Mapping[str, Any], number: int, shared: Mapping[str, Any], scoring: Mapping[str, Any]) -> Stage:
    (kind,), where = stage_kinds(entry), f"stages[{number}]{stage_title(entry)}"
    fields = {"name": entry[kind], **{key: value for key, value in entry.items() if key != kind}}
    train = _over(shared, fields.get("train", {}))
    try:
        check_name(fields["name"])
        if kind == "build":
            return _build(fields, train)
        if kind == "evaluate":
            return EvaluateStage(**{**fields, "settings": {**scoring, **fields.get("settings", {})}})
        if kind == "adapt":
            nested = {"train": _settings(train), "evaluate": {**scoring, **fields.get("evaluate", {})}}
            return AdaptStage(**{**fields, **nested})
        return DriftStage(**fields)
    except UsageError as error:
        raise UsageError(f"{where}: {error.rule}", found=error.found, remedy=error.remedy) from error


def _build(fields: Mapping[str, Any], train: Mapping[str, Any]) -> BuildStage:
    method, is_subset = fields.get("method", "private"), fields.get("method") == SUBSET
    if is_subset != (fields.get("of") is not None):
        raise UsageError(f"'of' belongs to method {SUBSET}", found=f"method {method}, of {fields.get('of')}")
    clusters = {option: fields.get(key) for key, option in CLUSTERS.items()}
    built_by = MethodSettings() if is_subset else method_settings(
        method,
        str(train.get("preset", "default")),
        None,
        mbc={**clusters, "k": None if clusters["k"] is None else str(clusters["k"])},
        poly={key: fields.get(key) for key in POLY},
        mu=fields.get("mu", False),
        per_task=fields.get("per_task", False),
    )  # fmt: skip
    placed = {key: fields.get(key) for key in ("tasks", "private", "of", "data")}
    return BuildStage(name=fields["name"], settings=_settings(train), method=built_by, **placed)


def _over(shared: Mapping[str, Any], stage_train: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's training over that of all: its epochs take the place of steps, and the other way round."""
    replaced = {"steps", "epochs"} if {"steps", "epochs"} & set(stage_train) else set()
    return {**{key: value for key, value in shared.items() if key not in replaced}, **stage_train}


def _settings(train: Mapping[str, Any]) -> BuildSettings:
    return preset(train.get("preset", "default"), **{key: value for key, value in train.items() if key != "preset"})
