"""A Poly build becomes skills, an assignment, and exports that compute exactly what the model did."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorary.build import poly as recipe
from lorary.build.jobs import ExpertSpec
from lorary.build.methods import PolySettings, poly_settings
from lorary.build.poly import commit_skills, is_finished, poly_stack, poly_unit
from lorary.build.poly_export import export_mu, export_tasks
from lorary.build.settings import BuildSettings, RunSettings
from lorary.data.batching import collate
from lorary.data.packing import Group, micro_batches
from lorary.data.schema import Row, Task, make_task
from lorary.data.template import Example
from lorary.errors import LibraryError, UsageError
from lorary.library.assignment import find_assignment, load_assignment
from lorary.library.store import Library
from lorary.lora.seat import seat, unseat
from lorary.model.attach import attach, detach
from lorary.model.base import Base, load_base
from lorary.model.logits import target_losses
from lorary.train.poly import PolyStack
from lorary.train.units import Job, TrainedUnit

Make = Callable[..., Any]
SETTINGS = BuildSettings(rank=2, alpha=6.0, target_modules=("v_proj", "down_proj"))
NAMES = ("sky", "sum", "may")


@pytest.fixture(scope="module")
def base(tiny_base_folder: Path) -> Base:
    return load_base(str(tiny_base_folder))


@pytest.fixture
def library(tmp_path: Path, tiny_base_folder: Path) -> Library:
    return Library.create(tmp_path / "lib", tiny_base_folder)


@pytest.fixture
def tasks() -> dict[str, Task]:
    rows = [Row(task="", split=split, source="Name it:", target="blue") for split in ("train", "val")]
    return {name: make_task(name, [replace(row, task=name) for row in rows], "a test") for name in NAMES}


class Model:
    """A Poly model whose parameters are random, so that every part of it shows."""

    def __init__(self, base: Base, poly: PolySettings, generator: torch.Generator) -> None:
        self.poly, self.unit = poly, poly_unit(NAMES, SETTINGS, poly)
        self.stack: PolyStack = poly_stack(base, self.unit, poly)
        self.stack.parameters.normal_(generator=generator)
        rows = [Example((1,), (2,), truncated=0)]
        self.job = Job("poly", rows, rows, num_steps=1, rank=2, alpha=6.0)
        found = self.stack.result(0, self.job, self.stack.parameters)
        self.trained = TrainedUnit("poly", found.adapters, found.extras, [3.0], [(0, 3.0), (1, 2.0)], 1, False)

    def commit(self, library: Library, tasks: dict[str, Task], base: Base) -> None:
        commit_skills(library, self.unit, self.poly, self.trained, tasks, base, RunSettings())

    def losses(self, base: Base, examples: Any, task: int) -> torch.Tensor:
        """Losses of the very modules that are trained, for rows of one task."""
        (micro,) = micro_batches([Group(0, task, examples, range(len(examples)))], 10_000, share_prefix=False)
        self.stack.tags.set(micro)
        handles = seat(base.model, self.stack.modules)
        try:
            with torch.no_grad():
                return target_losses(base.model, micro.batch)
        finally:
            unseat(base.model, list(self.stack.modules), handles)


@pytest.fixture(params=[1, 2], ids=["poly", "mhr"])
def model(request: pytest.FixtureRequest, base: Base, generator: torch.Generator) -> Model:
    return Model(base, PolySettings(skills=3, splits=request.param), generator)


def losses_of(base: Base, library: Library, expert: str, examples: Any) -> torch.Tensor:
    attach(base.model, library, experts=[expert])
    try:
        with torch.no_grad():
            return target_losses(base.model, collate(examples))
    finally:
        detach(base.model)


def test_the_export_of_a_task_is_what_the_trained_modules_compute_for_it(
    base: Base, library: Library, tasks: dict[str, Task], model: Model, random_examples: Make,
    generator: torch.Generator,
) -> None:  # fmt: skip
    model.commit(library, tasks, base)
    assert export_tasks(library) == sorted(NAMES)
    examples = random_examples(4, generator)
    bare = target_losses(base.model, collate(examples))
    for number, task in enumerate(sorted(NAMES)):
        expected = model.losses(base, examples, number)
        found = losses_of(base, library, task, examples)
        assert (found - expected).norm() <= 1e-6 * (expected - bare).norm() + 1e-6
        provenance = library.provenance(task)
        assert provenance["tasks"] == [task]
        assert provenance["method"] == f"{model.poly.method}-task"
        assert provenance["parents"] == [library.provenance(f"skill_{n}")["content_hash"] for n in range(3)]
        assert list(provenance["data_hashes"]) == [task]
        assert provenance["rank"] == 2
    assert library.verify() == []


def test_the_mean_is_what_logits_of_zero_give(
    base: Base, library: Library, tasks: dict[str, Task], model: Model, random_examples: Make,
    generator: torch.Generator,
) -> None:  # fmt: skip
    model.commit(library, tasks, base)
    assert export_mu(library) == "mu"
    for seated in model.stack.modules.values():
        seated.logits.data.zero_()
    examples = random_examples(4, generator)
    expected = model.losses(base, examples, 1)
    bare = target_losses(base.model, collate(examples))
    assert (losses_of(base, library, "mu", examples) - expected).norm() <= 1e-6 * (expected - bare).norm() + 1e-6
    skills = [library.get(f"skill_{number}").modules for number in range(3)]
    for path, factors in library.get("mu"):
        mean = sum(skill[path].lora_a for skill in skills) / 3
        assert torch.allclose(factors.lora_a, mean, rtol=0, atol=1e-6)
    assert library.provenance("mu")["tasks"] == sorted(NAMES)


def test_skills_are_ordinary_adapters_with_their_provenance(
    base: Base, library: Library, tasks: dict[str, Task], model: Model
) -> None:
    model.commit(library, tasks, base)
    assert library.names() == ["skill_0", "skill_1", "skill_2"]
    for name, modules in model.trained.adapters.items():
        adapter = library.get(name)
        assert all(torch.equal(adapter.modules[path].lora_a, modules[path].lora_a) for path in modules)
        known = library.provenance(name)
        assert (known["method"], known["tasks"]) == (model.poly.method, sorted(NAMES))
        assert known["settings"]["init"] == "own"
        splits = model.poly.splits
        assert known["assignment"] == {"skills": 3, "splits": splits, "logits_learning_rate": 0.1}
    assignment = load_assignment(library)
    assert assignment.tasks == tuple(sorted(NAMES))
    assert all(torch.equal(assignment.logits[path], z) for path, z in model.trained.extras.items())
    assert library.verify() == []


def test_a_commit_that_was_killed_half_way_is_completed_by_the_next(
    base: Base, library: Library, tasks: dict[str, Task], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    def finished() -> bool:
        return is_finished(library, model.unit, model.poly, tasks, str(base.model.dtype))

    assert not finished()
    add = Library.add_adapter

    def add_and_kill(*args: Any) -> None:
        add(*args)
        kill()

    with monkeypatch.context() as patch:
        patch.setattr(Library, "add_adapter", add_and_kill)
        with pytest.raises(KeyboardInterrupt):
            model.commit(library, tasks, base)
    assert library.names() == ["skill_0"]
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "save_assignment", kill)
        with pytest.raises(KeyboardInterrupt):
            model.commit(library, tasks, base)
    assert len(library) == 3
    assert not finished()
    model.commit(library, tasks, base)
    assert finished()
    model.commit(library, tasks, base)
    assert len(library) == 3


def test_exports_can_be_repeated_and_take_no_other_adapters_name(
    base: Base, library: Library, tasks: dict[str, Task], model: Model
) -> None:
    model.commit(library, tasks, base)
    assert export_mu(library) == export_mu(library) == "mu"
    assert export_tasks(library) == export_tasks(library)
    library.replace_adapter(replace(library.get("mu"), name="sky"), {"tasks": []})
    with pytest.raises(LibraryError, match="'sky' is taken"):
        export_tasks(library)


def test_skills_of_another_build_are_refused_by_name(
    base: Base, library: Library, tasks: dict[str, Task], model: Model
) -> None:
    model.commit(library, tasks, base)

    def check(unit: ExpertSpec, poly: PolySettings) -> bool:
        return is_finished(library, unit, poly, tasks, str(base.model.dtype))

    fewer = PolySettings(skills=2, splits=model.poly.splits)
    with pytest.raises(LibraryError, match=r"'skill_0' from another build\nfound: skills 3 instead of 2\n"):
        check(poly_unit(NAMES, SETTINGS, fewer), fewer)
    slower = BuildSettings(rank=2, alpha=6.0, target_modules=("v_proj", "down_proj"), learning_rate=1e-4)
    with pytest.raises(LibraryError, match="'skill_0' from another build\nfound: other settings: learning_rate"):
        check(poly_unit(NAMES, slower, model.poly), model.poly)


def test_a_skill_that_was_replaced_ends_the_exports(
    base: Base, library: Library, tasks: dict[str, Task], model: Model
) -> None:
    model.commit(library, tasks, base)
    library.remove("skill_1")
    assert find_assignment(library) is None
    with pytest.raises(LibraryError, match="other weights of skill_1"):
        export_mu(library)


def test_method_and_splits_must_agree() -> None:
    assert poly_settings("poly") == PolySettings(skills=8, splits=1, logits_learning_rate=0.1)
    assert poly_settings("mhr", skills=None) == PolySettings(splits=4)
    assert poly_settings("mhr", splits=2, skills=5).method == "mhr"
    with pytest.raises(UsageError, match="found: --method poly --splits 2\nremedy: --method mhr"):
        poly_settings("poly", splits=2)
    with pytest.raises(UsageError, match="found: --method mhr --splits 1"):
        poly_settings("mhr", splits=1)
    for field, value in (("skills", 0), ("splits", 0), ("logits_learning_rate", -0.1)):
        with pytest.raises(UsageError, match=f"--{field.replace('_', '-')} must be above 0"):
            poly_settings("mhr", **{field: value})
