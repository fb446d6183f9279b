"""Building in this process, over a tiny base: every method, what is kept, what is refused, what is left behind."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorary.build.build_library import build_library
from lorary.build.methods import MethodSettings, PolySettings
from lorary.build.settings import BuildSettings, BuildSource, RunSettings
from lorary.build.shards import Shard, build_shard
from lorary.data.schema import Task
from lorary.errors import BaseModelError, LibraryError, TaskError, TrainError, UsageError
from lorary.library.store import Library
from lorary.model.base import Base
from lorary.recipes.build import run_build
from lorary.train.callbacks import Callback
from lorary.train.choose_executor import make_executor

NAMES = ("alpha", "beta", "gamma", "delta")
SETTINGS = BuildSettings(steps=6, rank=2, batch_size=2, evals=2, learning_rate=0.02, val_rows=2)


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
    from lorary.build import experts

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
        reference, str(path), SETTINGS, source=BuildSource(str(tiny_base_folder), workers=2),
        run=RunSettings(window=2), executor=elsewhere,
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


def test_workers_of_this_machine_train_the_same_experts(
    base: Base, library: Library, tasks: Mapping[str, Task], reference: str, tmp_path: Path, tiny_base_folder: Path
) -> None:
    build_library(base, library, tasks, SETTINGS, run=RunSettings(window=2))
    path = tmp_path / "elsewhere"
    result = run_build(
        reference, str(path), SETTINGS, source=BuildSource(str(tiny_base_folder), workers=2),
        run=RunSettings(window=2, device="cpu"), executor=make_executor("local", workers=2, device="cpu"),
    )  # fmt: skip
    assert sorted(result.trained) == sorted(NAMES)
    alone = {name: library.provenance(name)["metrics"]["val_loss"] for name in NAMES}
    assert {name: after for name, (_, after) in result.val_losses.items()} == pytest.approx(alone, rel=1e-4)
    assert sorted(file.name for file in (path / "logs").iterdir()) == ["train-0.jsonl", "train-1.jsonl"]
    assert list((path / ".build").iterdir()) == []


class Given:
    """An executor that keeps its shards, and trains the first so many."""

    def __init__(self, trained: int = 0) -> None:
        self.shards: list[Shard] = []
        self.trained = trained

    def run(self, work: Any, shards: Any) -> None:
        self.shards = list(shards)
        for shard in shards[: self.trained]:
            work(shard)
        raise TrainError("the cluster is gone")


def plan_elsewhere(path: Path, reference: str, base: object, trained: int = 0, **options: Any) -> list[Shard]:
    """The shards of a build that is lost after so many of them."""
    given = Given(trained)
    with pytest.raises(TrainError):
        run_build(reference, str(path), SETTINGS, source=BuildSource(str(base), workers=2), executor=given, **options)
    return given.shards


def test_a_shard_whose_tasks_read_otherwise_on_its_machine_is_refused(
    reference: str, tmp_path: Path, tiny_base_folder: Path
) -> None:
    shard = plan_elsewhere(tmp_path / "lib", reference, tiny_base_folder)[0]
    assert set(shard.data) == set(shard.names)
    with pytest.raises(TaskError, match=r"'alpha' of .* the same rows on every machine[^$]*file system"):
        build_shard(replace(shard, data={**shard.data, "alpha": "0" * 64}))


def test_a_shard_on_a_base_of_another_dtype_than_before_is_refused(
    reference: str, tmp_path: Path, tiny_base_folder: Path
) -> None:
    path = tmp_path / "lib"
    plan_elsewhere(path, reference, tiny_base_folder, trained=1, run=RunSettings(window=1))
    assert len(Library.open(path)) == 1
    (shard, *_) = plan_elsewhere(path, reference, tiny_base_folder, run=RunSettings(window=1, dtype="bfloat16"))
    with pytest.raises(BaseModelError, match=r"bfloat16 .*torch.float32 before\nremedy: --dtype float32"):
        build_shard(shard)


def test_autocast_is_recorded_as_what_the_base_computed_in(
    base: Base, library: Library, tasks: Mapping[str, Task], reference: str, tmp_path: Path, tiny_base_folder: Path
) -> None:
    alpha = {"alpha": tasks["alpha"]}
    build_library(base, library, alpha, SETTINGS, run=RunSettings(autocast=True))
    assert library.provenance("alpha")["base_dtype"] == "torch.float32 with autocast"
    assert build_library(base, library, alpha, SETTINGS, run=RunSettings(autocast=True)).kept == ["alpha"]
    with pytest.raises(LibraryError, match=r"other base_dtype: torch.float32 with autocast instead of torch.float32"):
        build_library(base, library, alpha, SETTINGS)
    path = tmp_path / "lib"
    plan_elsewhere(path, reference, tiny_base_folder, trained=1, run=RunSettings(window=1, autocast=True))
    (shard, *_) = plan_elsewhere(path, reference, tiny_base_folder, run=RunSettings(window=1))
    with pytest.raises(BaseModelError, match=r"float32 on cpu here, .* before\nremedy: --dtype float32 --autocast"):
        build_shard(shard)


def test_words_for_tasks_and_base_stay_words_beside_folders_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorary.build.train_units import _absolute

    monkeypatch.chdir(tmp_path)
    for name in ("builtin", "embedded", "mine"):
        (tmp_path / name).mkdir()
    assert [_absolute(name) for name in ("builtin", "embedded")] == ["builtin", "embedded"]
    assert _absolute("mine") == str(tmp_path / "mine")


def test_another_executor_goes_on_with_the_shards_that_one_began(
    library: Library, reference: str, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorary.build import train_units as workshop

    shards = plan_elsewhere(library.path, reference, tiny_base_folder)
    train, seen = workshop.train_shard, list[str]()

    def note(shard: Shard, *args: Any) -> None:
        seen.append(shard.checkpoint)
        train(shard, *args)

    monkeypatch.setattr(workshop, "train_shard", note)
    run_build(reference, str(library.path), SETTINGS, source=BuildSource(str(tiny_base_folder)))
    assert len(seen) == 2
    assert seen == [shard.checkpoint for shard in shards]


def test_a_name_that_is_taken_is_refused_before_a_poly_model_is_trained(
    base: Base, library: Library, tasks: Mapping[str, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorary.train.forward import Forward

    build_library(base, library, {"alpha": tasks["alpha"]}, SETTINGS)
    steps: list[int] = []
    monkeypatch.setattr(Forward, "train_losses", lambda *args: steps.append(1))
    per_task = MethodSettings("poly", poly=PolySettings(skills=2), mu=True, per_task=True)
    with pytest.raises(LibraryError, match=r"name 'alpha' free .*\nfound: another adapter 'alpha'"):
        build_library(base, library, tasks, SETTINGS, per_task)
    for name in ("skill_0", "mu", "MU"):
        with pytest.raises(UsageError, match=f"--per-task .*\nfound: {name}"):
            build_library(base, library, {name: replace(tasks["beta"], name=name)}, SETTINGS, per_task)
    assert steps == []


def test_callbacks_and_logs_are_closed_where_the_build_fails(
    base: Base, library: Library, tasks: Mapping[str, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorary.build import shards
    from lorary.train.callbacks import JsonlCallback

    closed: list[str] = []

    def close(self: JsonlCallback) -> None:
        closed.append(os.readlink(f"/proc/self/fd/{self._file.fileno()}"))
        self._file.close()

    monkeypatch.setattr(JsonlCallback, "close", close)

    class Watch(Callback):
        def close(self) -> None:
            closed.append("watch")

    def fails(*args: Any, **options: Any) -> None:
        raise TrainError("the checkpoint must be one of this build")

    monkeypatch.setattr(shards, "train_queue", fails)
    with pytest.raises(TrainError):
        build_library(base, library, tasks, SETTINGS, callbacks=[Watch()])
    assert closed == [str(library.path.resolve() / "logs" / "train.jsonl"), "watch"]


def test_the_state_of_another_build_stays_where_nothing_was_trained(
    base: Base, library: Library, tasks: Mapping[str, Task]
) -> None:
    build_library(base, library, tasks, SETTINGS)
    state = library.path / ".build" / "1234-5678.safetensors"
    state.write_bytes(b"of another")
    build_library(base, library, tasks, SETTINGS)
    assert state.exists()


def test_memory_that_runs_out_is_said_and_logged_and_ends_nothing(
    base: Base, library: Library, tasks: Mapping[str, Task], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from lorary.train import forward

    original = forward.target_losses

    def losses(model: Any, batch: Any) -> Any:
        if batch.input_ids.numel() > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, batch)

    monkeypatch.setattr(forward, "target_losses", losses)
    result = build_library(base, library, tasks, SETTINGS, run=RunSettings(max_tokens="auto"))
    assert result.trained == sorted(NAMES)
    lines = [json.loads(line) for line in (library.path / "logs" / "train.jsonl").read_text().splitlines()]
    events = [(line["max_tokens"], line["reason"]) for line in lines if line["event"] == "budget"]
    assert events[0] == (1024, "the default, since memory is not measured on cpu")
    assert events[-1][0] <= 40
    said = capsys.readouterr().err
    assert all(f"{tokens:,} tokens a micro-batch: {reason}" in said for tokens, reason in events)
