"""Building by clusters over a tiny base: what is made of what, what is taken over, what must not be mixed."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorary.build.build_library import build_library
from lorary.build.choose_k import mean_task_loss
from lorary.build.cluster_settings import ClusterSettings
from lorary.build.jobs import ExpertSpec
from lorary.build.methods import MethodSettings
from lorary.build.settings import BuildSettings, BuildSource, RunSettings
from lorary.build.train_units import BuildContext
from lorary.data.schema import Task
from lorary.display import Display
from lorary.errors import LibraryError, UsageError
from lorary.library.store import Library
from lorary.model.base import Base
from lorary.recipes.build import run_build
from lorary.train.callbacks import JsonlCallback
from lorary.train.forward import Forward

NAMES = ("alpha", "beta", "gamma", "delta")
SETTINGS = BuildSettings(steps=6, rank=2, batch_size=2, evals=2, learning_rate=0.02, val_rows=2)
TWO = ClusterSettings(k=(2,), private_steps=4)


def weights(library: Library) -> dict[str, bytes]:
    folder = library.path / "adapters"
    return {path.parent.name: path.read_bytes() for path in sorted(folder.glob("*/adapter_model.safetensors"))}


def test_clusters_are_made_of_short_private_adapters_and_recorded(
    base: Base, library: Library, tasks: Mapping[str, Task]
) -> None:
    result = build_library(base, library, tasks, SETTINGS, MethodSettings("mbc", clusters=TWO))
    assert result.trained == ["cluster_0", "cluster_1"]
    assert sorted(name for own in result.tasks.values() for name in own) == sorted(NAMES)
    private = Library.open(library.path / ".build" / "private")
    assert private.provenance("alpha")["settings"]["steps"] == 4
    for name in result.trained:
        known = library.provenance(name)
        assert known["settings"]["steps"] == 6
        assert known["parents"] == [private.provenance(task)["content_hash"] for task in known["tasks"]]
        document = library.path / "derived" / known["clustering"]["clusters"] / "assignment.json"
        labels = json.loads(document.read_text())["labels"]
        assert sorted(task for task in NAMES if f"cluster_{labels[task]}" == name) == known["tasks"]
    again = build_library(base, library, tasks, SETTINGS, MethodSettings("mbc", clusters=TWO))
    assert (again.trained, again.kept) == ([], ["cluster_0", "cluster_1"])
    assert library.verify() == []


@pytest.mark.parametrize(("by", "k"), [("random", 3), ("family", 3)])
def test_baselines_of_clusters_need_no_private_adapters(
    by: str, k: int, base: Base, library: Library, tasks: Mapping[str, Task]
) -> None:
    result = build_library(base, library, tasks, SETTINGS, MethodSettings("mbc", clusters=ClusterSettings((k,), by)))
    assert len(result.trained) == (2 if by == "family" else k)  # families say themselves how many
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
    build_library(base, library, tasks, SETTINGS, MethodSettings("mbc", clusters=clusters))
    assert {name: data for name, data in weights(other).items() if name in before} == before
    assert other.provenance("delta")["settings"]["steps"] == 4  # the one that was missing
    with pytest.raises(UsageError, match="--private"):
        build_library(base, other, tasks, SETTINGS, MethodSettings("mbc", clusters=clusters))


def test_private_adapters_of_other_tasks_are_refused(
    base: Base, library: Library, tasks: Mapping[str, Task], tmp_path: Path, tiny_base_folder: Path
) -> None:
    other = Library.create(tmp_path / "other", str(tiny_base_folder))
    build_library(base, other, {"alpha": replace(tasks["beta"], name="alpha")}, SETTINGS)
    with pytest.raises(LibraryError, match=r"'alpha' of library .* must be one of task 'alpha'"):
        build_library(
            base, library, tasks, SETTINGS, MethodSettings("mbc", clusters=replace(TWO, private=str(other.path)))
        )


def test_the_k_of_the_lowest_validation_loss_is_kept(base: Base, library: Library, tasks: Mapping[str, Task]) -> None:
    several = MethodSettings("mbc", clusters=replace(TWO, k=(1, 2, 4)))
    result = build_library(base, library, tasks, SETTINGS, several)
    losses = {row["k"]: row["val_loss"] for row in result.choice}
    (chosen,) = (row["k"] for row in result.choice if row["chosen"])
    assert list(losses) == [1, 2, 4]
    assert losses[chosen] == min(losses.values())
    assert len(library) == chosen == len(result.trained)
    again = build_library(base, library, tasks, SETTINGS, several)
    assert (again.trained, again.choice) == ([], result.choice)
    assert [path.name for path in (library.path / ".build").iterdir()] == ["private"]


def test_more_clusters_than_tasks_are_refused_before_anything_is_trained(
    base: Base, library: Library, tasks: Mapping[str, Task]
) -> None:
    with pytest.raises(UsageError, match="between 1 and 4"):
        build_library(base, library, tasks, SETTINGS, MethodSettings("mbc"))
    assert not (library.path / ".build").exists()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def mbc(*k: int, **changes: Any) -> MethodSettings:
    return MethodSettings("mbc", clusters=replace(TWO, k=k, **changes))


@pytest.fixture
def trained_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every step that is trained."""
    steps: list[int] = []
    step = Forward.train_losses

    def counted(self: Forward, units: Any, max_tokens: int) -> dict[int, float]:
        steps.append(1)
        return step(self, units, max_tokens)

    monkeypatch.setattr(Forward, "train_losses", counted)
    return steps


def test_with_one_task_each_the_mean_over_tasks_is_that_of_the_experts(
    base: Base, library: Library, tasks: Mapping[str, Task]
) -> None:
    result = build_library(base, library, tasks, SETTINGS, mbc(4))
    units = [ExpertSpec(name, tuple(own), SETTINGS) for name, own in result.tasks.items()]
    context = BuildContext(library, tasks, RunSettings(), Display(), base)
    own = [after for _, after in result.val_losses.values()]
    assert mean_task_loss(context, library, units) == pytest.approx(sum(own) / 4, rel=1e-5)


def test_one_callback_watches_all_stages_and_is_closed_at_the_end(
    base: Base, library: Library, tasks: Mapping[str, Task], tmp_path: Path
) -> None:
    log = JsonlCallback(tmp_path / "all.jsonl")
    build_library(base, library, tasks, SETTINGS, mbc(1, 2), callbacks=[log])
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [set(line["jobs"]) for line in lines if line["event"] == "start"] == [
        set(NAMES), {"cluster_0"}, {"cluster_0", "cluster_1"}
    ]  # fmt: skip
    assert log._file.closed


def test_the_metrics_of_candidates_outlive_them(base: Base, library: Library, tasks: Mapping[str, Task]) -> None:
    build_library(base, library, tasks, SETTINGS, mbc(1, 2))
    assert [(library.path / "logs" / f"k-{k}" / "train.jsonl").exists() for k in (1, 2)] == [True, True]


def test_what_a_creation_that_was_killed_left_does_not_stop_a_build(
    reference: str, tmp_path: Path, tiny_base_folder: Path
) -> None:
    path = tmp_path / "lib"
    path.mkdir()
    (path / ".write.lock").touch()
    assert run_build(
        reference, str(path), SETTINGS, MethodSettings("joint"), source=BuildSource(str(tiny_base_folder))
    ).trained


@pytest.mark.parametrize("folder", ["private", "k"])
def test_a_stage_whose_library_was_never_finished_is_made_again(
    folder: str, base: Base, library: Library, tasks: Mapping[str, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Library.create

    def killed(path: Path, *args: Any, **options: Any) -> Library:
        if Path(path).name.startswith(folder):
            Path(path).mkdir(parents=True)
            (Path(path) / ".write.lock").touch()
            raise KeyboardInterrupt
        return create(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Library, "create", killed)
        with pytest.raises(KeyboardInterrupt):
            build_library(base, library, tasks, SETTINGS, mbc(1, 2))
    assert build_library(base, library, tasks, SETTINGS, mbc(1, 2)).trained


def test_a_build_killed_while_it_removes_candidates_goes_on(
    base: Base, library: Library, tasks: Mapping[str, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = shutil.rmtree

    def killed(name: str, *args: Any, dir_fd: int | None = None, **options: Any) -> None:
        folder = Path("" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")) / name
        if folder.parent.name != ".build":
            return remove(name, *args, dir_fd=dir_fd, **options)
        (folder / "library.json").unlink()  # it may go first
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            build_library(base, library, tasks, SETTINGS, mbc(1, 2))
    result = build_library(base, library, tasks, SETTINGS, mbc(1, 2))
    assert result.trained == []
    assert [path.name for path in (library.path / ".build").iterdir()] == ["private"]


def test_candidates_of_another_build_are_left_alone_and_go_once_one_ends_well(
    base: Base, library: Library, tasks: Mapping[str, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("lorary.build.choose_k.save_derived", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_library(base, library, tasks, SETTINGS, mbc(1, 2))
    left = {path.name for path in (library.path / ".build").iterdir()}
    assert len(left) == 3
    other = replace(SETTINGS, steps=7)
    result = build_library(base, library, tasks, other, mbc(1, 2))
    assert {library.provenance(name)["settings"]["steps"] for name in result.trained} == {7}
    assert [path.name for path in (library.path / ".build").iterdir()] == ["private"]


def interrupt(*args: Any, **options: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("k", [(1,), (1, 3)])
def test_experts_of_two_clusterings_never_come_into_one_library(
    k: tuple[int, ...], base: Base, library: Library, tasks: Mapping[str, Task], trained_steps: list[int]
) -> None:
    build_library(base, library, tasks, SETTINGS, mbc(2))
    before, steps = tree(library.path / "adapters"), len(trained_steps)
    with pytest.raises(LibraryError, match=r"one clustering\nfound: cluster_.*\nremedy: build into another library"):
        build_library(base, library, tasks, SETTINGS, mbc(*k))
    assert tree(library.path / "adapters") == before
    assert len(trained_steps) == steps


def test_a_whole_library_of_private_adapters_is_only_read(
    base: Base, library: Library, tasks: Mapping[str, Task], tmp_path: Path, tiny_base_folder: Path
) -> None:
    other = Library.create(tmp_path / "other", str(tiny_base_folder))
    build_library(base, other, tasks, SETTINGS)
    (other.path / ".build" / "1234-5678.safetensors").write_bytes(b"a checkpoint of its own build")
    with other.build_lock():
        before = tree(other.path)
        build_library(base, library, tasks, SETTINGS, mbc(2, private=str(other.path)))
        assert tree(other.path) == before


def test_a_library_of_private_adapters_that_is_in_use_is_not_to_be_deleted(
    base: Base, library: Library, tasks: Mapping[str, Task], tmp_path: Path, tiny_base_folder: Path
) -> None:
    other = Library.create(tmp_path / "other", str(tiny_base_folder))
    with other.build_lock(), pytest.raises(LibraryError, match="wait for that build"):
        build_library(base, library, tasks, SETTINGS, mbc(2, private=str(other.path)))


def test_private_adapters_of_an_older_build_are_to_be_deleted(
    base: Base, library: Library, tasks: Mapping[str, Task]
) -> None:
    build_library(base, library, tasks, SETTINGS, mbc(2))
    with pytest.raises(LibraryError, match=r"steps 4 instead of 5\nremedy: delete the folder .*private"):
        build_library(base, library, tasks, SETTINGS, mbc(2, private_steps=5))


def test_an_interrupted_private_pass_into_a_named_library_goes_on_with_the_same_company(
    base: Base, library: Library, tasks: Mapping[str, Task], tmp_path: Path, tiny_base_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    made = {}
    for kind in ("whole", "interrupted"):
        other = Library.create(tmp_path / kind, str(tiny_base_folder))
        build_library(base, other, {"alpha": tasks["alpha"]}, SETTINGS)
        commit, method = Library.add_adapter, mbc(2, private=str(other.path))
        with monkeypatch.context() as patch:
            if kind == "interrupted":

                def once(self: Library, adapter: Any, told: Any, commit: Any = commit) -> str:
                    if len(self) == 2:
                        raise KeyboardInterrupt
                    return commit(self, adapter, told)

                patch.setattr(Library, "add_adapter", once)
                with pytest.raises(KeyboardInterrupt):
                    build_library(base, library, tasks, SETTINGS, method)
        if kind == "interrupted":
            assert len(list((other.path / ".build").glob("*.safetensors"))) == 1
        target = Library.create(tmp_path / f"lib-{kind}", str(tiny_base_folder))
        build_library(base, target, tasks, SETTINGS, method)
        made[kind] = tree(other.path / "adapters")
        assert list((other.path / ".build").iterdir()) == []
    assert made["whole"] == made["interrupted"]


def test_clusters_by_family_follow_the_families(
    base: Base, library: Library, tasks: Mapping[str, Task], tmp_path: Path, tiny_base_folder: Path
) -> None:
    by_family = MethodSettings("mbc", clusters=ClusterSettings((1,), "family"))
    build_library(base, library, tasks, SETTINGS, by_family)
    other = {name: replace(task, family=name) for name, task in tasks.items()}
    with pytest.raises(LibraryError, match="another build"):
        build_library(base, library, other, SETTINGS, by_family)


def test_an_expert_whose_parents_have_changed_is_kept_and_named(
    base: Base, library: Library, tasks: Mapping[str, Task], capsys: pytest.CaptureFixture[str], tmp_path: Path,
    tiny_base_folder: Path,
) -> None:  # fmt: skip
    build_library(base, library, tasks, SETTINGS, mbc(1))
    assert "have changed" not in capsys.readouterr().err
    other = Library.create(tmp_path / "other", str(tiny_base_folder))
    build_library(base, other, tasks, SETTINGS)
    result = build_library(base, library, tasks, SETTINGS, mbc(1, private=str(other.path)))
    assert result.kept == ["cluster_0"]
    assert "name as parents have changed: cluster_0" in capsys.readouterr().err
