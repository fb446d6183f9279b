"""Mixtures of Poly's skills as ordinary adapters: the mean, for tasks it was not trained on, and one for each task."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lorary.adapter import Adapter, LoraFactors
from lorary.build.experts import other_build
from lorary.build.jobs import ExpertSpec
from lorary.build.methods import PolySettings
from lorary.build.poly import commit_once
from lorary.data.schema import Task
from lorary.errors import LibraryError, UsageError
from lorary.formats.peft import tensors_of
from lorary.library.assignment import Assignment, load_assignment
from lorary.library.store import Library
from lorary.lora.poly import mix_factors, mixing_weights
from lorary.train.poly import skill_names

MU = "mu"
# Keys of a skill's provenance that hold for each mixture of skills too.
INHERITED = ("settings", "seed", "template", "base_dtype", "assignment", "versions")


def check_exports(
    library: Library,
    unit: ExpertSpec,
    poly: PolySettings,
    tasks: Mapping[str, Task],
    base_dtype: str | None,
    *,
    mu: bool,
    per_task: bool,
) -> None:
    """Refuse names under which mixtures cannot be committed, before anything is trained.

    Args:
        library: where they go.
        unit: the model as planned.
        poly: its settings.
        tasks: all tasks, by name.
        base_dtype: as for `check_same_build`.
        mu: whether the mean is exported.
        per_task: whether the mixture of every task is.

    Raises:
        UsageError: if a task has the name of a skill, or of the mean.
        LibraryError: if a name is taken by an adapter that is no such mixture.
    """
    exported = {MU: (f"{poly.method}-mu", unit.tasks)} if mu else {}
    reserved = {name.casefold() for name in (*skill_names(poly.skills), *exported)}
    for task in unit.tasks if per_task else ():
        if task.casefold() in reserved:
            raise UsageError("--per-task needs tasks of other names than the skills and their mean", found=task,
                             remedy="leave it out, or name the task otherwise")  # fmt: skip
        exported[task] = (f"{poly.method}-task", (task,))
    taken = {name.casefold(): name for name in library.names()}
    for name, (method, of) in exported.items():
        if name.casefold() not in taken:
            continue
        other = taken[name.casefold()]
        is_own = other == name and library.provenance(name).get("method") == method
        if not is_own or other_build(library, replace(unit, name=name, tasks=of), tasks, base_dtype):
            raise LibraryError(
                f"library '{library.path}' must have the name '{name}' free for a mixture of skills",
                found=f"another adapter '{other}'",
                remedy="build into another library, or leave out --mu and --per-task",
            )


def export_mu(library: Library) -> str:
    """Commit the mean of the skills' factors as an ordinary adapter: what a task gets that Poly was not trained on.

    Args:
        library: holds skills and their assignment.

    Returns:
        The name of the adapter.

    Raises:
        LibraryError: if there is no assignment, or the name is taken by another adapter.
    """
    assignment, skills = _load(library)
    logits = {path: torch.zeros_like(values[0]) for path, values in assignment.logits.items()}
    return _export(library, MU, _mixture(skills, logits), assignment.tasks, f"{assignment.method}-mu", assignment)


def export_tasks(library: Library) -> list[str]:
    """Commit the mixture of each task as an ordinary adapter of its name and the skills' rank, which computes the same.

    Args:
        library: holds skills and their assignment.

    Returns:
        The names.

    Raises:
        LibraryError: as for `export_mu`.
    """
    assignment, skills = _load(library)
    exported = []
    for number, task in enumerate(assignment.tasks):
        modules = _mixture(skills, {path: values[number] for path, values in assignment.logits.items()})
        exported.append(_export(library, task, modules, (task,), f"{assignment.method}-task", assignment))
    return exported


def _load(library: Library) -> tuple[Assignment, list[Adapter]]:
    assignment = load_assignment(library)
    return assignment, [library.get(name) for name in assignment.skills]


def _mixture(skills: Sequence[Adapter], logits: Mapping[str, Tensor]) -> dict[str, LoraFactors]:
    """Mix skills by logits (splits, skills) of each layer, in float64, into factors of the skills' dtype."""
    modules = {}
    for path, values in logits.items():
        factors = [skill.modules[path] for skill in skills]
        lora_a, lora_b = (torch.stack([getattr(f, key).double() for f in factors]) for key in ("lora_a", "lora_b"))
        mixed_a, mixed_b = mix_factors(lora_a, lora_b, mixing_weights(values.double())[None])
        dtype = factors[0].lora_a.dtype
        modules[path] = LoraFactors(mixed_a[0].to(dtype), mixed_b[0].to(dtype), factors[0].scaling)
    return modules


def _export(
    library: Library,
    name: str,
    modules: Mapping[str, LoraFactors],
    tasks: Sequence[str],
    method: str,
    assignment: Assignment,
) -> str:
    first = next(iter(assignment.skills))
    skill_provenance = library.provenance(first)
    provenance: dict[str, Any] = {key: skill_provenance[key] for key in INHERITED if key in skill_provenance}
    provenance |= {
        key: {task: skill_provenance[key][task] for task in tasks}
        for key in ("families", "data_hashes")
        if key in skill_provenance
    }
    provenance |= {"method": method, "tasks": list(tasks), "parents": list(assignment.skills.values())}
    commit_once(library, Adapter(name, modules, library.get(first).config, tensors_of(modules)), provenance)
    return name
