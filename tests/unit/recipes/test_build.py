"""Building in this process, over a tiny base: every method, what is kept, what is refused, what is left behind."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorary.data.tasks import Task, load_tasks
from lorary.errors import LibraryError, UsageError
from lorary.library.store import Library
from lorary.model.base import Base, load_base
from lorary.recipes.build import MethodSettings, Shard, build_library, build_shard, run_build
from lorary.recipes.build_settings import BuildSettings, ClusterSettings, RunSettings
from lorary.recipes.estimate import run_estimate
from lorary.recipes.poly import PolySettings
from lorary.train.callbacks import Callback

NAMES = ("alpha", "beta", "gamma", "delta")
SETTINGS = BuildSettings(steps=6, rank=2, batch_size=2, evals=2, learning_rate=0.02, val_rows=2)
TWO = ClusterSettings(k=(2,), private_steps=4)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four tasks of two families, in a file: two say up, two say down."""
    path = tmp_path_factory.mktemp("tasks") / "tasks.jsonl"
    with open(path, "w") as file:
        for number, name in enumerate(NAMES):
            for split, count in (("train", 6 + number), ("val", 3)):
                for i in range(count):
                    row = {"task": name, "family": ["even", "odd"][number % 2], "split": split}
                    target = "up" if number % 2 else "down"
                    file.write(json.dumps({**row, "source": f"{name} {split} {i}:", "target": target}) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def tasks(reference: str) -> dict[str, Task]:
    """These tasks."""
    return load_tasks(reference)


@pytest.fixture(scope="module")
def base(tiny_base_folder: Path) -> Base:
    """The tiny base, loaded."""
    return load_base(str(tiny_base_folder))


@pytest.fixture
def library(tmp_path: Path, tiny_base_folder: Path) -> Library:
    """An empty library over the tiny base."""
    return Library.create(tmp_path / "lib", str(tiny_base_folder))


def method_of(method: str, **changes: Any) -> MethodSettings:
    return MethodSettings(method, **changes)


def weights(library: Library) -> dict[str, bytes]:
    folder = library.path / "adapters"
    return {path.parent.name: path.read_bytes() for path in sorted(folder.glob("*/adapter_model.safetensors"))}


def test_a_joint_expert_is_trained_on_all_tasks(base: Base, library: Library, tasks: Mapping[str, Task]) -> None:
    result = build_library(base, library, tasks, SETTINGS, method_of("joint"))
    assert (result.trained, result.tasks) == (["joint"], {"joint": sorted(NAMES)})
    known = library.provenance("joint")
    assert known["method"] == "joint"
    assert known["data_hashes"] == {name: task.data_hash for name, task in tasks.items()}
    assert known["metrics"]["val_loss"] < known["metrics"]["val_loss_base"]


def test_sampling_decides_what_a_joint_expert_becomes(
    base: Base, tasks: Mapping[str, Task], tmp_path: Path, tiny_base_folder: Path
) -> None:
    made = {}
    for sampling in ("proportional", "uniform", 0.1):
        library = Library.create(tmp_path / str(sampling), str(tiny_base_folder))
        build_library(base, library, tasks, replace(SETTINGS, sampling=sampling), method_of("joint"))
        made[sampling] = weights(library)["joint"]
    assert len(set(made.values())) == 3


def test_clusters_are_made_of_short_private_adapters_and_recorded(
    base: Base, library: Library, tasks: Mapping[str, Task]
) -> None:
    result = build_library(base, library, tasks, SETTINGS, method_of("mbc", clusters=TWO))
    assert result.trained == ["cluster_0", "cluster_1"]
    assert sorted(name for own in result.tasks.values() for name in own) == sorted(NAMES)
    private = Library.open(library.path / ".build" / "private")
    assert private.provenance("alpha")["settings"]["steps"] == 4
    for name in result.trained:
        known = library.provenance(name)
        assert known["settings"]["steps"] == 6
        assert known["parents"] == [private.provenance(task)["content_hash"] for task in known["tasks"]]
        document = library.path / "derived" / known["clustering"]["clusters"] / "clusters.json"
        labels = json.loads(document.read_text())["labels"]
        assert sorted(task for task in NAMES if f"cluster_{labels[task]}" == name) == known["tasks"]
    again = build_library(base, library, tasks, SETTINGS, method_of("mbc", clusters=TWO))
    assert (again.trained, again.kept) == ([], ["cluster_0", "cluster_1"])
    assert library.verify() == []


@pytest.mark.parametrize("by", ["random", "family"])
def test_baselines_of_clusters_need_no_private_adapters(
    by: str, base: Base, library: Library, tasks: Mapping[str, Task]
) -> None:
    result = build_library(base, library, tasks, SETTINGS, method_of("mbc", clusters=ClusterSettings((2,), by)))
    assert len(result.trained) == 2
    assert not (library.path / ".build" / "private").exists()
    if by == "family":
        assert result.tasks == {"cluster_0": ["alpha", "gamma"], "cluster_1": ["beta", "delta"]}


def test_private_adapters_of_a_library_that_is_named_are_taken_as_they_are(
    base: Base, library: Library, tasks: Mapping[str, Task], tmp_path: Path, tiny_base_folder: Path
) -> None:
    other = Library.create(tmp_path / "other", str(tiny_base_folder))
    some = {name: tasks[name] for name in NAMES[:3]}
    build_library(base, other, some, SETTINGS)
    before = weights(other)
    clusters = replace(TWO, private=str(other.path))
    build_library(base, library, tasks, SETTINGS, method_of("mbc", clusters=clusters))
    assert {name: data for name, data in weights(other).items() if name in before} == before
    assert other.provenance("delta")["settings"]["steps"] == 4  # the one that was missing
    with pytest.raises(UsageError, match="--private"):
        build_library(base, other, tasks, SETTINGS, method_of("mbc", clusters=clusters))


def test_private_adapters_of_other_tasks_are_refused(
    base: Base, library: Library, tasks: Mapping[str, Task], tmp_path: Path, tiny_base_folder: Path
) -> None:
    other = Library.create(tmp_path / "other", str(tiny_base_folder))
    build_library(base, other, {"alpha": replace(tasks["beta"], name="alpha")}, SETTINGS)
    with pytest.raises(LibraryError, match=r"'alpha' of library .* must be one of task 'alpha'"):
        build_library(base, library, tasks, SETTINGS, method_of("mbc", clusters=replace(TWO, private=str(other.path))))


def test_the_k_of_the_lowest_validation_loss_is_kept(base: Base, library: Library, tasks: Mapping[str, Task]) -> None:
    several = method_of("mbc", clusters=replace(TWO, k=(1, 2, 4)))
    result = build_library(base, library, tasks, SETTINGS, several)
    losses = {row["k"]: row["val_loss"] for row in result.choice}
    (chosen,) = (row["k"] for row in result.choice if row["chosen"])
    assert list(losses) == [1, 2, 4]
    assert losses[chosen] == min(losses.values())
    assert len(library) == chosen == len(result.trained)
    # One expert per task: the mean over tasks of its own loss is the mean over experts.
    if chosen == 4:
        own = [after for _, after in result.val_losses.values()]
        assert losses[4] == pytest.approx(sum(own) / 4, rel=1e-5)
    again = build_library(base, library, tasks, SETTINGS, several)
    assert (again.trained, again.choice) == ([], result.choice)
    assert [path.name for path in (library.path / ".build").iterdir()] == ["private"]


def test_more_clusters_than_tasks_are_refused_before_anything_is_trained(
    base: Base, library: Library, tasks: Mapping[str, Task]
) -> None:
    with pytest.raises(UsageError, match="--k must be at most 4"):
        build_library(base, library, tasks, SETTINGS, method_of("mbc"))
    assert not (library.path / ".build").exists()


def test_poly_ends_as_skills_with_an_assignment_and_mixtures(
    base: Base, library: Library, tasks: Mapping[str, Task]
) -> None:
    method = method_of("poly", poly=PolySettings(skills=2), mu=True, per_task=True)
    result = build_library(base, library, tasks, SETTINGS, method)
    assert result.trained == ["skill_0", "skill_1", "mu", *sorted(NAMES)]
    assert set(result.val_losses) == {"skill_0", "skill_1"}
    again = build_library(base, library, tasks, SETTINGS, method)
    assert (again.trained, again.kept) == ([], result.trained)
    with pytest.raises(LibraryError, match="another build"):
        build_library(base, library, tasks, replace(SETTINGS, seed=1), method)


def test_unequal_experts_pass_through_one_window(base: Base, library: Library, tasks: Mapping[str, Task]) -> None:
    overrides = {"alpha": {"rank": 3, "alpha": 6.0, "steps": 2, "target_modules": ["q_proj"]}}
    method = method_of("private", overrides=overrides)
    build_library(base, library, tasks, SETTINGS, method, run=RunSettings(window=2))
    assert library.verify() == []
    alpha, beta = library.get("alpha"), library.get("beta")
    assert (alpha.rank, beta.rank) == (3, 2)
    assert {path.rsplit(".", 1)[-1] for path in alpha.modules} == {"q_proj"}
    assert library.provenance("alpha")["settings"]["steps"] == 2
    with pytest.raises(LibraryError, match="rank 3 instead of 2"):
        build_library(base, library, tasks, SETTINGS)


def test_experts_recorded_before_a_setting_was_there_are_kept(
    base: Base, library: Library, tasks: Mapping[str, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorary.recipes import experts

    whole = experts.as_recorded
    with monkeypatch.context() as patch:
        new = ("patience", "sampling")
        patch.setattr(experts, "as_recorded", lambda s: {k: v for k, v in whole(s).items() if k not in new})
        build_library(base, library, tasks, SETTINGS)
    assert "patience" not in library.provenance("alpha")["settings"]
    assert build_library(base, library, tasks, SETTINGS).trained == []
    with pytest.raises(LibraryError, match="patience None instead of 3"):
        build_library(base, library, tasks, replace(SETTINGS, patience=3))


def test_what_builds_with_other_settings_left_behind_goes_when_a_build_ends_well(
    base: Base, library: Library, tasks: Mapping[str, Task]
) -> None:
    folder = library.path / ".build"
    folder.mkdir()
    for name in ("1234-5678.safetensors", "1234.json", "1234.tmp"):
        (folder / name).write_bytes(b"old")
    build_library(base, library, tasks, SETTINGS)
    assert list(folder.iterdir()) == []


def test_a_build_writes_its_metrics_beside_the_library_and_callbacks_watch(
    base: Base, library: Library, tasks: Mapping[str, Task]
) -> None:
    class Steps(Callback):
        last: dict[str, int] = {}  # noqa: RUF012 - one build, one test

        def on_step(self, steps: Mapping[str, int], losses: Mapping[str, float], tokens: int, seconds: float) -> None:
            self.last.update(steps)

    build_library(base, library, tasks, SETTINGS, callbacks=[Steps()])
    assert Steps.last == dict.fromkeys(NAMES, 6)
    lines = [json.loads(line) for line in (library.path / "logs" / "train.jsonl").read_text().splitlines()]
    assert lines
    assert library.verify() == []


def test_a_shard_in_a_process_of_its_own_trains_the_same_experts(
    base: Base, library: Library, tasks: Mapping[str, Task], reference: str, tmp_path: Path, tiny_base_folder: Path
) -> None:
    class Elsewhere:
        """An executor that trains nothing before all shards have come through a pickle."""

        def run(self, work: Any, shards: Any) -> None:
            import pickle

            self.shards = pickle.loads(pickle.dumps(shards))
            for shard in self.shards:
                assert isinstance(shard, Shard)
                work(shard)

    build_library(base, library, tasks, SETTINGS, run=RunSettings(window=2))
    elsewhere, path = Elsewhere(), tmp_path / "elsewhere"
    result = run_build(
        reference, str(path), SETTINGS, base=str(tiny_base_folder), run=RunSettings(window=2), executor=elsewhere,
        workers=2,
    )  # fmt: skip
    assert [shard.names for shard in elsewhere.shards] == [("alpha", "delta"), ("beta", "gamma")]
    assert sorted(result.trained) == sorted(NAMES)
    assert {name: library.provenance(name)["settings"] for name in NAMES} == {
        name: Library.open(path).provenance(name)["settings"] for name in NAMES
    }
    own, other = result.val_losses, {name: library.provenance(name)["metrics"]["val_loss"] for name in NAMES}
    assert {name: after for name, (_, after) in own.items()} == pytest.approx(other, rel=1e-4)
    build_shard(elsewhere.shards[0])  # what is there stays
    assert len(Library.open(path)) == len(NAMES)


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
    how = method_of(method, poly=PolySettings(skills=2))
    before = sorted(library.path.rglob("*"))
    # As many steps as make whole passes, so that every row is fed equally often.
    settings = replace(SETTINGS, steps=None, epochs=2.0, batch_size=1)
    estimate = run_estimate(reference, str(library.path), settings, how, base=str(tiny_base_folder))
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
    after = run_estimate(reference, str(library.path), settings, how, base=str(tiny_base_folder))
    assert (after.steps, after.experts) == (0, [])


def test_a_dry_run_of_clusters_counts_both_stages(
    reference: str, tiny_base_folder: Path, tmp_path: Path, base: Base, tasks: Mapping[str, Task]
) -> None:
    how = method_of("mbc", clusters=TWO)
    path = tmp_path / "nowhere"
    estimate = run_estimate(reference, str(path), SETTINGS, how, base=str(tiny_base_folder))
    assert not path.exists()
    assert estimate.steps == 4 * 4 + 2 * 6
    assert any("clusters" in note for note in estimate.notes)
