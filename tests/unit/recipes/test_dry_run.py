"""A dry run says what a build then takes, refuses what the build would refuse, and writes nothing."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorary.build.build_library import build_library
from lorary.build.cluster_settings import ClusterSettings
from lorary.build.methods import MethodSettings, PolySettings
from lorary.build.settings import BuildSettings, BuildSource
from lorary.data.schema import Task
from lorary.errors import BaseModelError, LibraryError, UsageError
from lorary.library.store import Library
from lorary.model.base import Base
from lorary.recipes.build import run_build
from lorary.recipes.estimate import Estimate, run_estimate
from lorary.train.callbacks import Callback

NAMES = ("alpha", "beta", "gamma", "delta")
SETTINGS = BuildSettings(steps=6, rank=2, batch_size=2, evals=2, learning_rate=0.02, val_rows=2)
TWO = ClusterSettings(k=(2,), private_steps=4)


class Fed(Callback):
    """Counts what a build feeds."""

    def __init__(self) -> None:
        self.tokens, self.steps = 0, 0

    def on_step(self, steps: Mapping[str, int], losses: Mapping[str, float], tokens: int, seconds: float) -> None:
        self.tokens += tokens
        self.steps += len(steps)


@pytest.mark.parametrize("method", ["private", "joint", "poly"])
def test_a_dry_run_says_what_the_build_then_takes_and_writes_nothing(
    method: str, base: Base, library: Library, tasks: Mapping[str, Task], reference: str, tiny_base_folder: Path
) -> None:
    how = MethodSettings(method, poly=PolySettings(skills=2))
    before = sorted(library.path.rglob("*"))
    # As many steps as make whole passes, so that every row is fed equally often.
    settings = replace(SETTINGS, steps=None, epochs=2.0, batch_size=1)
    estimate = run_estimate(reference, str(library.path), settings, how, source=BuildSource(str(tiny_base_folder)))
    assert sorted(library.path.rglob("*")) == before
    assert not (library.path / "logs").exists()
    fed = Fed()
    result = build_library(base, library, tasks, settings, how, callbacks=[fed])
    assert (estimate.steps, estimate.tokens) == (fed.steps, fed.tokens)
    assert estimate.parameters == sum(library.get(name).num_parameters for name in result.trained)
    assert estimate.memory["base"] == sum(p.numel() * p.element_size() for p in base.model.parameters())
    assert estimate.memory["activations"] > 0
    assert estimate.seconds > 0
    assert "about" in estimate.text()
    after = run_estimate(reference, str(library.path), settings, how, source=BuildSource(str(tiny_base_folder)))
    assert (after.steps, after.experts) == (0, [])


def test_a_dry_run_of_clusters_counts_both_stages(
    reference: str, tiny_base_folder: Path, tmp_path: Path, base: Base, tasks: Mapping[str, Task]
) -> None:
    how = MethodSettings("mbc", clusters=TWO)
    path = tmp_path / "nowhere"
    estimate = run_estimate(reference, str(path), SETTINGS, how, source=BuildSource(str(tiny_base_folder)))
    assert not path.exists()
    assert estimate.steps == 4 * 4 + 2 * 6
    assert any("clusters" in note for note in estimate.notes)


@pytest.fixture
def dry_run(reference: str, library: Library, tiny_base_folder: Path) -> Callable[..., Estimate]:
    """Plan a build into the library: `dry_run(method, settings)`."""
    return lambda method, settings=SETTINGS, base=tiny_base_folder: run_estimate(
        reference, str(library.path), settings, method, source=BuildSource(str(base))
    )


Plan = Callable[..., Estimate]


def test_overrides_of_clusters_are_planned_and_checked(dry_run: Plan) -> None:
    estimate = dry_run(MethodSettings("mbc", clusters=TWO, overrides={"cluster_1": {"steps": 2}}))
    assert {row["name"]: row["steps"] for row in estimate.experts if row["stage"] == "2 clusters"} == {
        "cluster_0": 6, "cluster_1": 2
    }  # fmt: skip
    with pytest.raises(UsageError, match=r"--overrides must name experts of this build\nfound:.*cluster_2"):
        dry_run(MethodSettings("mbc", clusters=TWO, overrides={"cluster_2": {"steps": 2}}))


@pytest.mark.parametrize("method", ["private", "joint", "mbc", "poly"])
def test_experts_of_another_build_are_refused_as_the_build_would(
    method: str, base: Base, library: Library, tasks: Mapping[str, Task], dry_run: Plan
) -> None:
    how = MethodSettings(method, clusters=TWO, poly=PolySettings(skills=2))
    build_library(base, library, tasks, SETTINGS, how)
    assert dry_run(how).experts == []
    with pytest.raises(LibraryError, match="from another build"):
        dry_run(how, replace(SETTINGS, learning_rate=0.01))


def test_a_poly_model_with_a_skill_missing_is_still_to_be_trained(
    base: Base, library: Library, tasks: Mapping[str, Task], dry_run: Plan
) -> None:
    how = MethodSettings("poly", poly=PolySettings(skills=2))
    build_library(base, library, tasks, SETTINGS, how)
    library.remove("skill_1")
    assert [row["name"] for row in dry_run(how).experts] == ["poly"]


def test_another_base_is_refused(library: Library, dry_run: Plan, tmp_path: Path, tiny_tokenizer: Any,
                                 tiny_model: Callable[..., Any]) -> None:  # fmt: skip
    from lorary.formats.quiet import quiet_transformers

    with quiet_transformers():
        tiny_model(seed=1, num_hidden_layers=3).save_pretrained(tmp_path / "other")
        tiny_tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(BaseModelError):
        dry_run(MethodSettings(), base=tmp_path / "other")


@pytest.mark.parametrize(("by", "expected"), [("family", [["alpha", "gamma"], ["beta", "delta"]]), ("random", None)])
def test_clusters_that_need_no_adapters_are_known_beforehand(
    by: str, expected: list[list[str]] | None, base: Base, library: Library, tasks: Mapping[str, Task], dry_run: Plan
) -> None:
    how = MethodSettings("mbc", clusters=ClusterSettings((3,), by))
    estimate = dry_run(how)
    planned = {row["name"]: row["tasks"] for row in estimate.experts}
    if expected is not None:
        assert list(planned.values()) == expected
    assert estimate.notes == []
    assert build_library(base, library, tasks, SETTINGS, how).tasks == planned


def test_a_choice_of_k_that_is_finished_leaves_nothing_to_do(
    base: Base, library: Library, tasks: Mapping[str, Task], dry_run: Plan, tiny_base_folder: Path, reference: str
) -> None:
    how = MethodSettings("mbc", clusters=replace(TWO, k=(1, 2)))
    assert {row["stage"] for row in dry_run(how).experts} == {"private adapters", "1 clusters", "2 clusters"}
    result = run_build(reference, str(library.path), SETTINGS, how, source=BuildSource(str(tiny_base_folder)))
    after = dry_run(how)
    assert after.experts == []
    assert after.kept == [*sorted(NAMES), *result.trained]
