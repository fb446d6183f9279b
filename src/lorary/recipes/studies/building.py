"""A build stage: a library by one of Lorary's methods, or a part of another library."""

import os
from dataclasses import asdict, replace
from typing import Any

from lorary.library.document import LIBRARY_FILE
from lorary.library.folders import ADAPTERS
from lorary.library.store import Library
from lorary.recipes.build import run_build
from lorary.recipes.build_settings import BuildSettings, as_recorded
from lorary.recipes.methods import MethodSettings
from lorary.recipes.open import open_or_create
from lorary.recipes.studies.config import BuildStage
from lorary.recipes.studies.place import Place


def build_inputs(place: Place, stage: BuildStage) -> dict[str, Any]:
    """What decides the experts, beside the libraries that the stage reads."""
    _, tasks = place.training_tasks(stage)
    by_family = stage.method.method == "mbc" and stage.method.clusters.by == "family"
    return {
        # Defaults are left out: a setting that a later version adds must not make what is trained another's.
        "settings": _not_default(as_recorded(stage.settings), as_recorded(BuildSettings())),
        "method": _not_default(asdict(stage.method), asdict(MethodSettings())),
        "of": stage.of,
        "tasks": {name: task.data_hash for name, task in tasks.items()},
        "families": {name: task.family for name, task in tasks.items()} if by_family else {},
        "base": place.base_digest,
        "dtype": place.study.run.dtype,
    }


def _not_default(own: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for key, value in own.items():
        if isinstance(value, dict) and isinstance(default.get(key), dict):
            value = _not_default(value, default[key])
        if value != default.get(key) and value != {}:
            found[key] = value
    return found


def build_outputs(place: Place, stage: BuildStage) -> dict[str, str]:
    """Content hash of every expert of the library as it is now; empty where there is none."""
    path = place.library(stage.name)
    if not (path / LIBRARY_FILE).exists():
        return {}
    return {row["name"]: row["hash"] for row in Library.open(path).describe()}


def set_aside(place: Place, stage: BuildStage) -> None:
    """Move a library away that earlier settings of the study have made: nothing is deleted, nothing is mixed."""
    path = place.library(stage.name)
    if not path.exists():
        return
    folder = place.out / "superseded"
    folder.mkdir(parents=True, exist_ok=True)
    number = next(n for n in range(1, 10_000) if not (folder / f"{stage.name}-{n}").exists())
    os.rename(path, folder / f"{stage.name}-{number}")
    place.display.say(
        f"build:{stage.name} has other inputs now: its library went to {folder / f'{stage.name}-{number}'}"
    )


def run_build_stage(place: Place, stage: BuildStage) -> str:
    """Build the library, as `lorary build` would.

    Returns:
        A line on what it holds.
    """
    reference, tasks = place.training_tasks(stage)
    if stage.of is not None:
        return _take_part(place, stage, list(tasks))
    result = run_build(
        reference,
        str(place.library(stage.name)),
        stage.settings,
        placed_method(place, stage),
        base=place.study.base,
        names=list(tasks),
        run=place.study.run,
    )
    return f"{len(result.trained)} experts trained, {len(result.kept)} kept"


def placed_method(place: Place, stage: BuildStage) -> MethodSettings:
    """The method, its private adapters at the folder where the study has them."""
    if stage.private is None:
        return stage.method
    return replace(stage.method, clusters=replace(stage.method.clusters, private=str(place.library(stage.private))))


def _take_part(place: Place, stage: BuildStage, names: list[str]) -> str:
    """A private expert does not depend on its neighbours: some of a library are what training them alone would give."""
    source = Library.open(place.library(str(stage.of)))
    part = open_or_create(str(place.library(stage.name)), place.study.base)
    for name in names:
        if name not in part:
            part.add(source.path / ADAPTERS / name)
    return f"{len(names)} of the {len(source)} experts of {stage.of}"


def command_of(place: Place, stage: BuildStage) -> str:
    """The plain command that makes the same library."""
    reference = stage.data or place.study.train.reference or place.tasks_folder or "TASKS"
    path = place.library(stage.name)
    if stage.of is not None:
        _, tasks = place.training_tasks(stage)
        source = place.library(stage.of) / ADAPTERS
        return f"lorary library add {path} {source}/NAME --base {place.study.base} (NAME: {', '.join(tasks)})"
    _, tasks = place.training_tasks(stage)
    options = [f"--library {path}", f"--method {stage.method.method}", f"--tasks {','.join(tasks)}"]
    options += [] if place.study.base == "embedded" else [f"--base {place.study.base}"]
    options += _options(stage.settings)
    clusters, poly = stage.method.clusters, stage.method.poly
    if stage.method.method == "mbc":
        options += [f"--k {','.join(map(str, clusters.k)) or 'auto'}", f"--cluster-by {clusters.by}"]
        options += [f"--private {place.library(stage.private)}"] if stage.private else []
    if stage.method.is_poly:
        options += [f"--skills {poly.skills}"] + ([f"--splits {poly.splits}"] if stage.method.method == "mhr" else [])
        options += ["--mu"] * stage.method.mu + ["--per-task"] * stage.method.per_task
    return " ".join(["lorary build", reference, *options])


def _options(settings: BuildSettings) -> list[str]:
    """The settings that are not the defaults of `lorary build`, as its options."""
    changed = _not_default(as_recorded(settings), as_recorded(BuildSettings()))
    changed = {key: value for key, value in changed.items() if value is not None}
    words = {key: ",".join(value) if isinstance(value, list) else value for key, value in changed.items()}
    return [f"--{key.replace('_', '-')} {value}" for key, value in words.items()]
