"""A build stage: a library by one of Lorary's methods, or a part of another library."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from shlex import quote
from typing import Any

from lorary.build.build_library import build_library
from lorary.build.methods import MethodSettings
from lorary.build.settings import PRESETS, BuildSettings, as_recorded, preset
from lorary.errors import LibraryError
from lorary.library.layout import ADAPTERS, LIBRARY_FILE
from lorary.library.opening import created_for, open_or_create
from lorary.library.store import Library
from lorary.study.config import BuildStage
from lorary.study.context import StudyContext, TimedDisplay
from lorary.train.callbacks import Callback

# Settings that `lorary build` has no option for: presets alone change them.
NO_OPTION = frozenset({"warmup", "clip", "weight_decay", "init_scale"})


def build_inputs(context: StudyContext, stage: BuildStage) -> dict[str, Any]:
    """What decides the experts, beside the libraries that the stage reads."""
    _, tasks = context.training_tasks(stage)
    by_family = stage.method.method == "mbc" and stage.method.clusters.by == "family"
    return {
        "settings": changed_settings(stage.settings),
        "method": _not_default(asdict(stage.method), asdict(MethodSettings())),
        "of": stage.of,
        "tasks": {name: task.data_hash for name, task in tasks.items()},
        "families": {name: task.family for name, task in tasks.items()} if by_family else {},
        "base": context.base_content,
        "dtype": context.study.run.precision,
    }


def changed_settings(settings: BuildSettings) -> dict[str, Any]:
    """Settings without those that are the default: one that a later version adds must make nothing another's."""
    return _not_default(as_recorded(settings), as_recorded(BuildSettings()))


def _not_default(settings: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    changed = {}
    for key, value in settings.items():
        if isinstance(value, dict) and isinstance(default.get(key), dict):
            value = _not_default(value, default[key])
        if value != default.get(key) and value != {}:
            changed[key] = value
    return changed


def build_outputs(context: StudyContext, stage: BuildStage) -> dict[str, str]:
    """Content hash of every expert of the library as it is now; empty where there is none."""
    path = context.library(stage.name)
    if not (path / LIBRARY_FILE).exists():
        return {}
    return _hashes(Library.open(path))


def _hashes(library: Library) -> dict[str, str]:
    return {row["name"]: row["hash"] for row in library.describe()}


def set_aside(context: StudyContext, stage: BuildStage) -> None:
    """Move a library away that earlier settings of the study have made: nothing is deleted, nothing is mixed."""
    path = context.library(stage.name)
    if not path.exists():
        return
    folder = context.out / "superseded"
    folder.mkdir(parents=True, exist_ok=True)
    number = next(n for n in range(1, 10_000) if not (folder / f"{stage.name}-{n}").exists())
    os.rename(path, folder / f"{stage.name}-{number}")
    context.display.say(
        f"build:{stage.name} has other inputs now: its library went to {folder / f'{stage.name}-{number}'}"
    )


def run_build_stage(context: StudyContext, stage: BuildStage) -> str:
    """Build the library, as `lorary build` would.

    Returns:
        A line on what it holds.

    Raises:
        LibraryError: if the library whose adapters are clustered lacks tasks.
        OutOfTime: between two steps; what was trained is kept.
    """
    _, tasks = context.training_tasks(stage)
    if stage.of is not None:
        return _take_part(context, stage, list(tasks))
    _check_private(context, stage, list(tasks))
    with created_for(str(context.library(stage.name)), context.study.base) as library:
        result = build_library(
            context.base,
            library,
            tasks,
            stage.settings,
            method_at(context, stage),
            run=context.study.run,
            callbacks=[_Clock(context.display)],
            display=context.display,
        )
    return f"{len(result.trained)} experts trained, {len(result.kept)} kept"


class _Clock(Callback):
    """Ends a build where the time of the study is over."""

    def __init__(self, display: TimedDisplay) -> None:
        self._display = display

    def on_step(self, steps: Mapping[str, int], losses: Mapping[str, float], tokens: int, seconds: float) -> None:
        """Look at the clock."""
        self._display.check_time()


def _check_private(context: StudyContext, stage: BuildStage, names: Sequence[str]) -> None:
    """Refuse to cluster a library of the study that lacks tasks: training them there would make it another one."""
    if stage.private is None:
        return
    held = Library.open(context.library(stage.private)).names()
    if missing := [name for name in names if name not in held]:
        raise LibraryError(
            f"library {stage.private} must hold an adapter of each task that build:{stage.name} clusters",
            found=f"none of {missing[0]}",
            remedy="give both the same tasks",
        )


def method_at(context: StudyContext, stage: BuildStage) -> MethodSettings:
    """The method, its private adapters at the folder where the study has them."""
    if stage.private is None:
        return stage.method
    return replace(stage.method, clusters=replace(stage.method.clusters, private=str(context.library(stage.private))))


def _take_part(context: StudyContext, stage: BuildStage, names: list[str]) -> str:
    """A private expert does not depend on its neighbours: some of a library are what training them alone would give."""
    source = Library.open(context.library(str(stage.of)))
    part = open_or_create(str(context.library(stage.name)), context.study.base)
    source_hashes, part_hashes = (_hashes(library) for library in (source, part))
    for name in names:
        if name not in part_hashes:
            part.add(source.path / ADAPTERS / name)
        elif part_hashes[name] != source_hashes[name]:
            raise LibraryError(
                f"library {stage.name} must hold the experts of {stage.of}, byte for byte",
                found=f"another {name}",
                remedy=f"lorary library remove {part.path} {name}, and run again",
            )
    return f"{len(names)} of the {len(source)} experts of {stage.of}"


def command_of(context: StudyContext, stage: BuildStage) -> str | None:
    """The plain command that makes the same library; None where its options cannot say all settings."""
    reference = stage.data or context.study.train.reference or context.tasks_folder or "TASKS"
    path = quote(str(context.library(stage.name)))
    if stage.of is not None:
        _, tasks = context.training_tasks(stage)
        source = quote(str(context.library(stage.of) / ADAPTERS / "NAME"))
        return f"lorary library add {path} {source} --base {quote(context.study.base)} (NAME: {', '.join(tasks)})"
    _, tasks = context.training_tasks(stage)
    settings = _options(stage.settings)
    if settings is None:
        return None
    options = [f"--library {path}", f"--method {stage.method.method}", f"--tasks {quote(','.join(tasks))}"]
    options += [] if context.study.base == "embedded" else [f"--base {quote(context.study.base)}"]
    options += [*settings, *_method_options(context, stage)]
    run = {"device": context.study.run.device, "dtype": context.study.run.dtype}
    options += [f"--{key} {value}" for key, value in run.items() if value != "auto"]
    options += ["--autocast"] if context.study.run.autocast else []
    return " ".join(["lorary build", quote(reference), *options])


def _method_options(context: StudyContext, stage: BuildStage) -> list[str]:
    clusters, poly, method = stage.method.clusters, stage.method.poly, stage.method
    if method.method == "mbc":
        passes = {"private-steps": clusters.private_steps, "private-epochs": clusters.private_epochs}
        return [
            f"--k {','.join(map(str, clusters.k)) or 'auto'}",
            f"--cluster-by {clusters.by}",
            f"--cluster-method {clusters.method}",
            f"--cluster-seed {clusters.seed}",
            *([f"--private {quote(str(context.library(stage.private)))}"] if stage.private else []),
            *(f"--{key} {value}" for key, value in passes.items() if value is not None),
        ]
    if not method.is_poly:
        return []
    splits = [f"--splits {poly.splits}"] if method.method == "mhr" else []
    skills = [f"--skills {poly.skills}", *splits, f"--logits-learning-rate {poly.logits_learning_rate}"]
    return [*skills, *["--mu"] * method.mu, *["--per-task"] * method.per_task]


def _options(settings: BuildSettings) -> list[str] | None:
    """Settings as options of `lorary build`, beside a preset that leaves none which has no option; None without one."""
    for name in PRESETS:
        changed = _not_default(as_recorded(settings), as_recorded(preset(name)))
        if not NO_OPTION & set(changed):
            # Steps are None where epochs are given, and the other way round.
            options = {key: value for key, value in changed.items() if value is not None}
            words = {key: ",".join(value) if isinstance(value, list) else value for key, value in options.items()}
            start = [] if name == "default" else [f"--preset {name}"]
            return [*start, *(f"--{key.replace('_', '-')} {quote(str(value))}" for key, value in words.items())]
    return None
