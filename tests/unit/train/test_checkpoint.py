"""A checkpoint comes back to the bit, or is refused without touching what it should have filled."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorary.data.template import Example
from lorary.errors import TrainError
from lorary.train.checkpoint import load_checkpoint, save_checkpoint
from lorary.train.optimiser import OptimiserSettings
from lorary.train.slots import Progress, Slots
from lorary.train.stack import ExpertStack
from lorary.train.units import Job, LoopSettings

ROWS = [Example((1, 2), (3,), 0), Example((1, 2, 3), (3, 4), 0)]
JOBS = [Job(name, ROWS, ROWS, num_steps=9, rank=1, alpha=2.0) for name in ("b", "a", "c", "d")]
SETTINGS = LoopSettings(OptimiserSettings(0.1), batch_size=2)


def slots_of(
    jobs: list[Job] = JOBS, settings: LoopSettings = SETTINGS, dtype: torch.dtype = torch.float64, num_slots: int = 3
) -> Slots:
    stack = ExpertStack(num_slots, {"q_proj": (4, 3)}, 1, dtype, torch.device("cpu"))
    return Slots(jobs, stack, settings)


def vectors(slots: Slots) -> list[torch.Tensor]:
    return [slots.stack.parameters, slots.optimiser.first, slots.optimiser.second, slots.best]


def running(**changes: Any) -> Slots:
    """Two of three slots are taken, by units at different steps."""
    slots = slots_of(**changes)
    slots.fill()
    for number, vector in enumerate(vectors(slots), 1):
        vector.fill_(number / 3)
    slots.slots[1] = None
    for unit, step in zip(slots.present(), (3, 1, 1), strict=False):
        unit.progress = Progress(step, [1.0, 0.1 + 0.2], [(0, 3.0), (3, 1e-17)])
    return slots


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint in a folder of its own."""
    path = tmp_path / "build" / "queue.safetensors"
    save_checkpoint(path, running())
    return path


def test_a_checkpoint_comes_back_to_the_bit(path: Path) -> None:
    slots, before = slots_of(), running()
    assert load_checkpoint(path, slots)
    assert all(torch.equal(one, other) for one, other in zip(vectors(slots), vectors(before), strict=True))
    assert [u and (u.index, u.job, u.progress) for u in slots.slots] == [
        u and (u.index, u.job, u.progress) for u in before.slots
    ]
    assert slots.waiting == before.waiting == 3
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_no_checkpoint_is_no_progress(tmp_path: Path) -> None:
    slots = slots_of()
    assert not load_checkpoint(tmp_path / "none", slots)
    assert slots.present() == []


def test_what_decides_nothing_may_change(path: Path) -> None:
    settings = replace(SETTINGS, max_tokens=7, save_every_s=1.0, activation_checkpointing=True)
    assert load_checkpoint(path, slots_of(settings=settings))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def scramble(path: Path) -> None:
    path.write_bytes(b"\xff" * 500)


def rewrite(path: Path, change: Callable[[Any], None]) -> None:
    with safe_open(path, framework="pt") as file:
        progress = json.loads(file.metadata()["progress"])
    change(progress)
    save_file(load_file(path), path, {"progress": json.dumps(progress)})


def without_history(path: Path) -> None:
    save_file(load_file(path), path)


def without_moments(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({"parameters": load_file(path)["parameters"]}, path, metadata)


def with_broken_history(path: Path) -> None:
    rewrite(path, lambda progress: progress["units"][0].pop("step"))


def with_a_unit_of_another_name(path: Path) -> None:
    rewrite(path, lambda progress: progress["units"][0].update(name="z"))


def with_a_unit_that_is_none(path: Path) -> None:
    rewrite(path, lambda progress: progress["units"].insert(0, "b"))


def in_float32(path: Path) -> None:
    save_checkpoint(path, running(dtype=torch.float32))


def of_another_window(path: Path) -> None:
    save_checkpoint(path, running(num_slots=4))


def in_another_order(path: Path) -> None:
    save_checkpoint(path, running(jobs=JOBS[::-1]))


def of_another_rank(path: Path) -> None:
    save_checkpoint(path, running(jobs=[replace(JOBS[0], alpha=1.0), *JOBS[1:]]))


def of_another_seed(path: Path) -> None:
    save_checkpoint(path, running(settings=replace(SETTINGS, seed=1)))


def as_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [truncate, empty, scramble, without_history, without_moments, with_broken_history, with_a_unit_of_another_name,
     with_a_unit_that_is_none, in_float32, of_another_window, in_another_order, of_another_rank, of_another_seed,
     as_a_folder],
)  # fmt: skip
def test_a_damaged_or_foreign_checkpoint_is_refused_by_name(path: Path, damage: Callable[[Path], None]) -> None:
    damage(path)
    slots = slots_of()
    before = [vector.clone() for vector in vectors(slots)]
    with pytest.raises(TrainError, match=f"the checkpoint '{path}' must be one of this build") as error:
        load_checkpoint(path, slots)
    assert error.value.remedy is not None
    assert error.value.remedy.startswith("delete it")
    assert all(torch.equal(one, other) for one, other in zip(vectors(slots), before, strict=True))
    assert slots.present() == []


def test_a_checkpoint_that_cannot_be_written_keeps_the_last_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(TrainError, match=r"must be writable\nfound: .*No space left on device"):
        save_checkpoint(path, slots_of())
    slots = slots_of()
    assert load_checkpoint(path, slots)
    assert len(slots.present()) == 2
    assert [file.name for file in path.parent.iterdir()] == [path.name]
