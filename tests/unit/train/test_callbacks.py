"""Callbacks hear of everything once, in order, and write it where it can be read back."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lorary.errors import MissingExtraError
from lorary.train import callbacks
from lorary.train.callbacks import Callback, JsonlCallback, TensorBoardCallback, TrackioCallback, WandbCallback
from lorary.train.units import Job, TrainedUnit

Make = Callable[..., Any]


def test_events_come_once_and_in_order(tiny_model: Make, jobs: list[Job], loop_settings: Make, train: Make) -> None:
    heard: list[Any] = []

    class Hears(Callback):
        def on_start(self, jobs: Any) -> None:
            heard.append([job.name for job in jobs])

        def on_step(self, steps: Any, losses: Any, tokens: int, seconds: float) -> None:
            assert tokens > 0
            assert seconds > 0
            heard.append(dict(steps))

        def on_eval(self, name: str, step: int, loss: float, adapters: Any) -> None:
            factors = adapters()[name]["model.layers.0.self_attn.v_proj"]
            heard.append((name, step, bool(factors.lora_b.any())))

        def on_finish(self, unit: TrainedUnit) -> None:
            heard.append(unit.name)

        def close(self) -> None:
            heard.append("closed")

    queue = [replace(job, num_steps=2) for job in jobs[1:]]
    train(tiny_model(), queue, loop_settings(), slots=1, callbacks=[Hears()])
    expected: list[Any] = [["long", "few"]]
    for name in ("long", "few"):
        expected += [(name, 0, False), {name: 1}, (name, 1, True), {name: 2}, (name, 2, True), name]
    assert heard == expected  # whoever opened it closes it


def test_jsonl_lines_say_what_happened(
    tiny_model: Make, jobs: list[Job], loop_settings: Make, train: Make, tmp_path: Path
) -> None:
    path = tmp_path / "logs" / "train.jsonl"
    queue = [replace(jobs[0], num_steps=2)]
    for _ in range(2):
        log = JsonlCallback(path)
        (unit,) = train(tiny_model(), queue, loop_settings(), callbacks=[log])
        log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"event": "start", "jobs": {"short": 2}}
    assert [line["loss"] for line in lines if line["event"] == "eval"][:3] == [loss for _, loss in unit.val_losses]
    steps = [line for line in lines if line["event"] == "step"]
    assert [line["losses"]["short"] for line in steps][:2] == unit.train_losses
    assert [line["steps"] for line in steps][:2] == [{"short": 1}, {"short": 2}]
    assert {"event": "finish", "name": "short", "best_step": unit.best_step, "stopped_early": False} in lines
    # A second run appends, and repeats the same.
    assert [line["event"] for line in lines[: len(lines) // 2]] == [line["event"] for line in lines[len(lines) // 2 :]]


@pytest.mark.parametrize(("package", "make"), [("wandb", WandbCallback), ("trackio", TrackioCallback)])
def test_trackers_get_steps_and_losses_of_each_unit(
    tiny_model: Make, jobs: list[Job], loop_settings: Make, train: Make, monkeypatch: pytest.MonkeyPatch,
    package: str, make: Make,
) -> None:  # fmt: skip
    calls: list[Any] = []
    stub = ModuleType(package)
    stub.__dict__.update(
        init=lambda **settings: calls.append(settings), log=calls.append, finish=lambda: calls.append("finished")
    )
    monkeypatch.setitem(sys.modules, package, stub)
    tracker = make(config={"rank": 2})
    (unit,) = train(tiny_model(), [replace(jobs[0], num_steps=1)], loop_settings(), callbacks=[tracker])
    tracker.close()
    (_, before), (_, after) = unit.val_losses
    speed = calls[2].pop("tokens_per_s")
    assert speed > 0
    assert calls == [
        {"project": "lorary", "config": {"rank": 2}},
        {"step/short": 0, "val_loss/short": before},
        {"step/short": 1, "train_loss/short": unit.train_losses[0]},
        {"step/short": 1, "val_loss/short": after},
        "finished",
    ]


class Writer:
    """Stands for TensorBoard's."""

    def __init__(self, folder: str) -> None:
        self.folder, self.points, self.is_closed = folder, list[tuple[str, float, int]](), False

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.points.append((tag, value, step))

    def close(self) -> None:
        self.is_closed = True


def test_tensorboard_gets_a_curve_for_each_unit(
    tiny_model: Make, jobs: list[Job], loop_settings: Make, train: Make, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    modules = {"tensorboard": None, "torch.utils.tensorboard": SimpleNamespace(SummaryWriter=Writer)}
    monkeypatch.setattr(callbacks, "import_module", modules.__getitem__)
    callback = TensorBoardCallback(tmp_path)
    (unit,) = train(tiny_model(), [replace(jobs[0], num_steps=1)], loop_settings(), callbacks=[callback])
    callback.close()
    writer = callback._writer
    (_, before), (_, after) = unit.val_losses
    assert writer.points == [
        ("val_loss/short", before, 0), ("train_loss/short", unit.train_losses[0], 1), ("val_loss/short", after, 1)
    ]  # fmt: skip
    assert (writer.folder, writer.is_closed) == (str(tmp_path), True)


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs tensorboard: pip install 'lorary[tensorboard]'")
def test_tensorboard_writes_a_file(tmp_path: Path) -> None:
    callback = TensorBoardCallback(tmp_path)
    callback.on_step({"a": 1}, {"a": 2.0}, 10, 0.1)
    callback.close()
    assert list(tmp_path.glob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    ("package", "make"), [("wandb", WandbCallback), ("trackio", TrackioCallback), ("tensorboard", TensorBoardCallback)]
)
def test_a_tracker_that_is_not_installed_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, make: Make
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"'{package}'.*\n.*pip install 'lorary\[{package}\]'"):
        make(tmp_path) if package == "tensorboard" else make()


def test_callbacks_are_left_open_for_the_next_queue(
    tiny_model: Make, jobs: list[Job], loop_settings: Make, train: Make, tmp_path: Path
) -> None:
    log = JsonlCallback(tmp_path / "train.jsonl")
    for name in ("short", "long"):
        train(
            tiny_model(),
            [replace(job, num_steps=1) for job in jobs if job.name == name],
            loop_settings(),
            callbacks=[log],
        )
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines if line["event"] == "finish"] == ["short", "long"]


def test_a_step_of_no_time_at_all_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    points: list[Any] = []
    stub = ModuleType("wandb")
    stub.__dict__.update(init=lambda **settings: None, log=points.append, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    WandbCallback().on_step({"a": 1}, {"a": 2.0}, 10, 0.0)
    assert points[0]["tokens_per_s"] > 0
