"""A checkpoint comes back to the bit, or is refused without touching what it should have filled."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorary.errors import TrainError
from lorary.train.checkpoint import Progress, load_checkpoint, save_checkpoint
from lorary.train.optimiser import ExpertwiseAdamW, OptimiserSettings

NAMES = ("b", "a")
PROGRESS = Progress(3, {"b": [1.0, 0.1 + 0.2], "a": [2.0, 1.5]}, {"b": [(0, 3.0)], "a": [(0, 4.0), (3, 1e-17)]})


def state(value: float, size: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ExpertwiseAdamW, Tensor]:
    parameters = torch.full((size,), value, dtype=dtype)
    optimiser = ExpertwiseAdamW(parameters, OptimiserSettings(0.1, 5))
    optimiser.first.fill_(2 * value)
    optimiser.second.fill_(3 * value)
    return parameters, optimiser, torch.full((size,), 4 * value, dtype=dtype)


def values(parameters: Tensor, optimiser: ExpertwiseAdamW, best: Tensor) -> list[list[float]]:
    return [tensor.tolist() for tensor in (parameters, optimiser.first, optimiser.second, best)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint in a folder of its own."""
    path = tmp_path / "build" / "window.safetensors"
    save_checkpoint(path, PROGRESS, *state(1 / 3))
    return path


def test_a_checkpoint_comes_back_to_the_bit(path: Path) -> None:
    parameters, optimiser, best = state(0.0)
    assert load_checkpoint(path, NAMES, parameters, optimiser, best) == PROGRESS
    assert values(parameters, optimiser, best) == values(*state(1 / 3))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_no_checkpoint_is_no_progress(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "none", NAMES, *state(0.0)) is None


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def scramble(path: Path) -> None:
    path.write_bytes(b"\xff" * 500)


def without_history(path: Path) -> None:
    save_file({key: torch.zeros(6).double() for key in ("parameters", "first", "second", "best")}, path)


def without_moments(path: Path) -> None:
    save_file({"parameters": torch.zeros(6).double()}, path, {"progress": "{}"})


def with_broken_history(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(rb"\"step\"", rb"\"stop\""))


def with_one_number(path: Path) -> None:
    save_checkpoint(path, PROGRESS, *state(0.5, size=1))


def in_float32(path: Path) -> None:
    save_checkpoint(path, PROGRESS, *state(0.5, dtype=torch.float32))


def of_other_experts(path: Path) -> None:
    turned = {name: PROGRESS.train_losses[name] for name in ("a", "b")}
    save_checkpoint(path, Progress(3, turned, PROGRESS.val_losses), *state(0.5))


def as_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [truncate, empty, scramble, without_history, without_moments, with_broken_history, with_one_number, in_float32,
     of_other_experts, as_a_folder],
)  # fmt: skip
def test_a_damaged_or_foreign_checkpoint_is_refused_by_name(path: Path, damage: Callable[[Path], None]) -> None:
    damage(path)
    parameters, optimiser, best = state(7.0)
    with pytest.raises(TrainError, match=f"the checkpoint '{path}' must be one of this build") as error:
        load_checkpoint(path, NAMES, parameters, optimiser, best)
    assert error.value.remedy == "delete it and rerun"
    assert values(parameters, optimiser, best) == values(*state(7.0))


def test_a_checkpoint_that_cannot_be_written_keeps_the_last_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(TrainError, match=r"must be writable\nfound: .*No space left on device"):
        save_checkpoint(path, Progress(), *state(9.0))
    parameters, optimiser, best = state(0.0)
    assert load_checkpoint(path, NAMES, parameters, optimiser, best) == PROGRESS
    assert [file.name for file in path.parent.iterdir()] == [path.name]
