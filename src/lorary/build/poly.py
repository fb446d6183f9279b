"""Poly and MHR: what the model is made of, and what becomes of it: skills in the library, their assignment beside."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lorary.adapter import Adapter, content_hash
from lorary.build.experts import check_same_build, provenance_of, targets_of, to_adapter
from lorary.build.jobs import Unit
from lorary.build.settings import BuildSettings, option
from lorary.data.schema import Task
from lorary.errors import LibraryError, UsageError
from lorary.library.assignment import Assignment, find_assignment, save_assignment
from lorary.library.store import Library
from lorary.model.base import Base
from lorary.numbers import check_count, check_number
from lorary.train.poly import PolyStack, skill_names
from lorary.train.units import TrainedUnit

POLY, MHR = "poly", "mhr"
MHR_SPLITS = 4


@dataclass(frozen=True)
class PolySettings:
    """What decides a Poly or MHR model beside the settings of every build; recorded in the skills' provenance.

    Args:
        skills: skills that all tasks share.
        splits: blocks of each layer with weights of their own: 1 is Poly, more is MHR.
        logits_learning_rate: peak learning rate of the assignment.
    """

    skills: int = 8
    splits: int = 1
    logits_learning_rate: float = 0.1

    def __post_init__(self) -> None:
        for key in ("skills", "splits"):
            check_count(option(key), getattr(self, key), above=0, most=1 << 16)
        check_number("--logits-learning-rate", self.logits_learning_rate, above=0.0)

    @property
    def method(self) -> str:
        """`poly` or `mhr`."""
        return POLY if self.splits == 1 else MHR


def poly_settings(method: str, *, splits: int | None = None, **changes: Any) -> PolySettings:
    """The settings of a method by name.

    Args:
        method: `poly` or `mhr`.
        splits: 1 for Poly; for MHR 2 or more, 4 where None.
        changes: other fields of `PolySettings`; None keeps the default.

    Raises:
        UsageError: if method and splits disagree, or a value is out of range.
    """
    given = {key: value for key, value in changes.items() if value is not None}
    default = 1 if method == POLY else MHR_SPLITS
    settings = PolySettings(splits=default if splits is None else splits, **given)
    if settings.method != method:
        raise UsageError(
            "--method poly has 1 split and mhr has 2 or more",
            found=f"--method {method} --splits {splits}",
            remedy=f"--method {settings.method}",
        )
    return settings


def poly_unit(tasks: Sequence[str], settings: BuildSettings, poly: PolySettings) -> Unit:
    """The one unit of a Poly build: a model of all tasks, whose result is its skills.

    Args:
        tasks: names of the tasks; their sorted order is that of the assignment.
        settings: how to train. `init` says how experts of a library relate and does not apply: the skills of a model
            always have draws of their own (see `PolyStack.fill`), which is what is recorded.
        poly: skills and splits.
    """
    return Unit(poly.method, tuple(sorted(tasks)), replace(settings, init="own"), poly.method)


def poly_stack(base: Base, unit: Unit, poly: PolySettings) -> PolyStack:
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
    library: Library, unit: Unit, poly: PolySettings, tasks: Mapping[str, Task], base_dtype: str | None
) -> bool:
    """Whether a library holds all that this build would put there.

    Args:
        library: where the skills go.
        unit: the model.
        poly: its settings.
        tasks: all tasks, by name.
        base_dtype: as for `check_same_build`.

    Raises:
        LibraryError: if it holds a skill of another build.
    """
    names = skill_names(poly.skills)
    there = [name for name in names if name in library]
    check_same_build(library, [replace(unit, name=name) for name in there], tasks, base_dtype)
    wanted = asdict(poly)
    for name in there:
        recorded = library.provenance(name).get("assignment", {})
        other = [key for key, value in wanted.items() if recorded.get(key) != value]
        if other:
            raise LibraryError(
                f"library '{library.path}' must not hold '{name}' from another build",
                found=", ".join(f"{key} {recorded.get(key)} instead of {wanted[key]}" for key in other),
                remedy="build into another library",
            )
    assignment = find_assignment(library) if len(there) == len(names) else None
    return assignment is not None and (assignment.tasks, tuple(assignment.skills)) == (unit.tasks, names)


def commit_skills(
    library: Library, unit: Unit, poly: PolySettings, trained: TrainedUnit, tasks: Mapping[str, Task], base: Base
) -> Assignment:
    """Commit the skills of a finished model as adapters, then its assignment; what is there already stays.

    Args:
        library: where they go.
        unit: the model as planned.
        poly: its settings.
        trained: the model as trained.
        tasks: all tasks, by name.
        base: what it was trained on.

    Returns:
        The assignment.

    Raises:
        LibraryError: if a skill's name is taken by another adapter, or the library cannot be written.
    """
    told = {**provenance_of(unit, trained, tasks, base), "assignment": asdict(poly)}
    hashes = {}
    for name, modules in trained.adapters.items():
        adapter = to_adapter(replace(unit, name=name), modules, base)
        hashes[name] = commit_once(library, adapter, told)
    assignment = Assignment(unit.tasks, hashes, trained.extras)
    kept = ("settings", "assignment", "data_hashes", "base_dtype")
    save_assignment(library, assignment, {key: told[key] for key in kept})
    return assignment


def commit_once(library: Library, adapter: Adapter, told: Mapping[str, Any]) -> str:
    """Commit an adapter unless it is there already, with the same content: what was killed half-way is repeated.

    Args:
        library: where it goes.
        adapter: from memory.
        told: its provenance.

    Returns:
        The hash of its content.

    Raises:
        LibraryError: if its name is taken by another adapter.
    """
    digest = content_hash(adapter.config, adapter.tensors)
    if adapter.name not in library or library.provenance(adapter.name)["content_hash"] != digest:
        library.add_adapter(adapter, told)
    return digest
