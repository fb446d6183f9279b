"""Finished experts: their adapter and provenance, and whether one that is there already is this build's."""

import json
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from lorary.adapter import Adapter, LoraFactors
from lorary.build.jobs import CLUSTER, ExpertSpec
from lorary.build.settings import BuildSettings, RunSettings, as_recorded, recorded_settings
from lorary.data.schema import Task
from lorary.data.tokenizer_content import text_of
from lorary.errors import LibraryError, UsageError
from lorary.formats.peft import tensors_of
from lorary.formats.peft_config import new_config
from lorary.library.store import Library
from lorary.lora.targets import ALL_LINEAR, find_targets, language_paths, num_layers
from lorary.model.base import Base
from lorary.model.verdict import verdict_of
from lorary.train.units import TrainedUnit

Shapes = dict[str, tuple[int, int]]
CLUSTER_NAME = re.compile(rf"{CLUSTER}\d+")


def targets_of(base: Base, settings: BuildSettings) -> Shapes:
    """(d_in, d_out) of each layer that these settings adapt, by path.

    Raises:
        UsageError: if a target or the number of upper layers is not in the base.
    """
    layers = None
    if settings.upper_layers is not None:
        total = num_layers(base.model)
        if settings.upper_layers > total:
            raise UsageError(f"--upper-layers must be at most {total}, the base's layers", found=settings.upper_layers)
        layers = list(range(total - settings.upper_layers, total))
    return find_targets(base.model, settings.target_modules, layers, verdict_of(base.model).dead)


def to_adapter(unit: ExpertSpec, modules: Mapping[str, LoraFactors], base: Base) -> Adapter:
    """The adapter of a finished expert, with a configuration that PEFT reads.

    Args:
        unit: what it was to be.
        modules: factors of its best checkpoint, by path.
        base: what it was trained on.
    """
    settings = unit.settings
    # PEFT would look for factors of these names in the other parts of a multimodal model too.
    is_part = settings.upper_layers is not None or bool(language_paths(base.model))
    by_suffix = not is_part and ALL_LINEAR not in settings.target_modules
    config = new_config(
        base.files.name,
        rank=settings.rank,
        alpha=settings.alpha,
        target_modules=sorted(settings.target_modules) if by_suffix else sorted(modules),
        dropout=settings.dropout,
    )
    return Adapter(unit.name, modules, config, tensors_of(modules))


def provenance_of(
    unit: ExpertSpec, trained: TrainedUnit, tasks: Mapping[str, Task], base: Base, run: RunSettings
) -> dict[str, Any]:
    """What is recorded about a finished expert: all that decided it, and how the training went. It holds no time."""
    return {
        "method": unit.method,
        "tasks": list(unit.tasks),
        "families": {name: tasks[name].family for name in unit.tasks},
        "data_hashes": {name: tasks[name].data_hash for name in unit.tasks},
        "settings": as_recorded(unit.settings),
        "seed": unit.settings.seed,
        "template": unit.settings.template,
        "base_dtype": run.precision_of(base.model),
        **text_of(base.tokenizer, unit.settings.template),
        "metrics": metrics_of(trained),
        "parents": list(unit.parents),
        **({"clustering": dict(unit.origin)} if unit.origin else {}),
        "versions": {package: version(package) for package in ("lorary", "torch", "transformers")},
    }


def metrics_of(trained: TrainedUnit) -> dict[str, Any]:
    """How a training went, as values of JSON; `val_loss_base` is the loss of the initial weights, whose update is 0."""
    return {
        "val_loss_base": trained.val_losses[0][1],
        "val_loss": min(loss for _, loss in trained.val_losses),
        "best_step": trained.best_step,
        "stopped_early": trained.stopped_early,
        "val_losses": trained.val_losses,
        "train_losses": trained.train_losses,
    }


def check_same_build(
    library: Library,
    units: Sequence[ExpertSpec],
    tasks: Mapping[str, Task],
    base_dtype: str | None,
    tokenizer: str | None = None,
) -> None:
    """An expert that is there already counts as finished only if this build would train it alike.

    Args:
        library: that holds them.
        units: those of this build that it holds.
        tasks: all tasks, by name.
        base_dtype: of the base in this process; None where other machines train, each with a base of its own.
        tokenizer: hash of that base's tokenizer.

    Raises:
        LibraryError: naming the first expert of another build, and what differs.
    """
    for unit in units:
        if other := other_build(library, unit, tasks, base_dtype, tokenizer):
            raise LibraryError(
                f"library '{library.path}' must not hold an expert '{unit.name}' from another build",
                found=other,
                remedy=f"build into another library, or: lorary library remove {library.path} {unit.name}",
            )


def other_build(
    library: Library, unit: ExpertSpec, tasks: Mapping[str, Task], base_dtype: str | None, tokenizer: str | None = None
) -> str | None:
    """What an expert that is there differs in from what this build would make; None where it is the same.

    Args and errors as for `check_same_build`.
    """
    provenance = library.provenance(unit.name)
    expected: dict[str, Any] = {
        "settings": as_recorded(unit.settings),
        "data_hashes": {name: tasks[name].data_hash for name in unit.tasks},
    }
    if base_dtype is not None:
        expected["base_dtype"] = base_dtype
    if tokenizer is not None and "tokenizer" in provenance:  # older experts do not say
        expected["tokenizer"] = tokenizer
    if isinstance(provenance.get("settings"), Mapping):
        provenance = {**provenance, "settings": recorded_settings(provenance["settings"])}
    for key, value in expected.items():
        recorded, normalised = provenance.get(key), json.loads(json.dumps(value))
        if recorded != normalised:
            return f"other {key}: {_difference(recorded, normalised)}"
    return None


def check_clusters(
    library: Library, units: Sequence[ExpertSpec], tasks: Mapping[str, Task], base_dtype: str | None
) -> None:
    """A library holds the experts of one clustering, since tasks would have several experts otherwise.

    Args:
        library: that is built.
        units: its experts to be; none where their number is still to be chosen.
        tasks: all tasks, by name.
        base_dtype: as for `check_same_build`.

    Raises:
        LibraryError: if it holds experts of clusters that are not among them, or of another build.
    """
    names, planned = set(library.names()), {unit.name for unit in units}
    foreign = sorted(name for name in names - planned if CLUSTER_NAME.fullmatch(name))
    if foreign:
        raise LibraryError(
            f"library '{library.path}' must hold the experts of one clustering",
            found=f"{', '.join(foreign[:5])} of another",
            remedy="build into another library",
        )
    check_same_build(library, [unit for unit in units if unit.name in names], tasks, base_dtype)


def _difference(recorded: Any, expected: Any) -> str:
    if recorded is None:
        return "none recorded"
    if not isinstance(recorded, Mapping) or not isinstance(expected, Mapping):
        return f"{recorded} instead of {expected}"
    keys = sorted(key for key in {*recorded, *expected} if recorded.get(key) != expected.get(key))
    return ", ".join(f"{key} {recorded.get(key)!r} instead of {expected.get(key)!r}" for key in keys[:5])


def val_losses(library: Library, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Validation loss of the bare base and of the expert, by name; mixtures of skills have none of their own."""
    metrics = {name: library.provenance(name).get("metrics") for name in names}
    return {name: (float(m["val_loss_base"]), float(m["val_loss"])) for name, m in metrics.items() if m}
