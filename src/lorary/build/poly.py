"""Poly and MHR: what the model is made of, and what becomes of it: skills in the library, their assignment beside."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from lorary.adapter import Adapter, content_hash
from lorary.build.experts import check_same_build, provenance_of, targets_of, to_adapter
from lorary.build.jobs import ExpertSpec
from lorary.build.methods import PolySettings
from lorary.build.settings import BuildSettings, RunSettings
from lorary.data.schema import Task
from lorary.errors import LibraryError
from lorary.library.assignment import Assignment, find_assignment, save_assignment
from lorary.library.store import Library
from lorary.model.base import Base
from lorary.train.poly import PolyStack, skill_names
from lorary.train.units import TrainedUnit


def poly_unit(tasks: Sequence[str], settings: BuildSettings, poly: PolySettings) -> ExpertSpec:
    """The one unit of a Poly build: a model of all tasks, whose result is its skills.

    Args:
        tasks: names of the tasks; their sorted order is that of the assignment.
        settings: how to train. `init` says how experts of a library relate and does not apply: the skills of a model
            always have draws of their own (see `PolyStack.fill`), which is what is recorded.
        poly: skills and splits.
    """
    return ExpertSpec(poly.method, tuple(sorted(tasks)), replace(settings, init="own"), poly.method)


def poly_stack(base: Base, unit: ExpertSpec, poly: PolySettings) -> PolyStack:
    """The parameters to train.

    Raises:
        ShapeError: if the splits do not cut every layer into equal blocks.
        UsageError: if a target is not in the base.
    """
    settings = unit.settings
    return PolyStack(
        targets_of(base, settings),
        num_tasks=len(unit.tasks),
        num_skills=poly.skills,
        num_splits=poly.splits,
        rank=settings.rank,
        scaling=settings.alpha / settings.rank,
        logits_rate=poly.logits_learning_rate / settings.learning_rate,
        dtype=torch.float64 if base.model.dtype == torch.float64 else torch.float32,
        device=base.model.device,
    )


def is_finished(
    library: Library, unit: ExpertSpec, poly: PolySettings, tasks: Mapping[str, Task], base_dtype: str | None
) -> bool:
    """Whether a library holds all that this build would put there.

    Arguments are those of `lorary.build.poly_export.check_exports`.

    Raises:
        LibraryError: if it holds a skill of another build.
    """
    names = skill_names(poly.skills)
    existing = [name for name in names if name in library]
    check_same_build(library, [replace(unit, name=name) for name in existing], tasks, base_dtype)
    expected = asdict(poly)
    for name in existing:
        recorded = library.provenance(name).get("assignment", {})
        other = [key for key, value in expected.items() if recorded.get(key) != value]
        if other:
            raise LibraryError(
                f"library '{library.path}' must not hold '{name}' from another build",
                found=", ".join(f"{key} {recorded.get(key)} instead of {expected[key]}" for key in other),
                remedy="build into another library",
            )
    assignment = find_assignment(library) if len(existing) == len(names) else None
    return assignment is not None and (assignment.tasks, tuple(assignment.skills)) == (unit.tasks, names)


def commit_skills(
    library: Library,
    unit: ExpertSpec,
    poly: PolySettings,
    trained: TrainedUnit,
    tasks: Mapping[str, Task],
    base: Base,
    run: RunSettings,
) -> Assignment:
    """Commit the skills of a finished model as adapters, then its assignment; what is there already stays.

    Args:
        library: where they go.
        unit: the model as planned.
        poly: its settings.
        trained: the model as trained.
        tasks: all tasks, by name.
        base: what it was trained on.
        run: how it was run.

    Returns:
        The assignment.

    Raises:
        LibraryError: if a skill's name is taken by another adapter, or the library cannot be written.
    """
    provenance = {**provenance_of(unit, trained, tasks, base, run), "assignment": asdict(poly)}
    hashes = {}
    for name, modules in trained.adapters.items():
        adapter = to_adapter(replace(unit, name=name), modules, base)
        hashes[name] = commit_once(library, adapter, provenance)
    assignment = Assignment(unit.tasks, hashes, trained.extras)
    shared_keys = ("settings", "assignment", "data_hashes", "base_dtype")
    save_assignment(library, assignment, {key: provenance[key] for key in shared_keys})
    return assignment


def commit_once(library: Library, adapter: Adapter, provenance: Mapping[str, Any]) -> str:
    """Commit an adapter unless it is there already, with the same content: what was killed half-way is repeated.

    Args:
        library: where it goes.
        adapter: from memory.
        provenance: its provenance.

    Returns:
        The hash of its content.

    Raises:
        LibraryError: if its name is taken by another adapter.
    """
    digest = content_hash(adapter.config, adapter.tensors)
    if adapter.name not in library or library.provenance(adapter.name)["content_hash"] != digest:
        library.add_adapter(adapter, provenance)
    return digest
