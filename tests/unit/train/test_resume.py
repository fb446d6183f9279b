"""A queue that is killed goes on to the same bits: after any step, any hand-over, Ctrl-C, and a kill of the process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lorary.train.callbacks import Callback
from lorary.train.loop import train_queue
from lorary.train.optimiser import SlotwiseAdamW
from lorary.train.units import Job, LoopSettings, TrainedUnit

Make = Callable[..., Any]
# Units of 5, 2, 3 and 2 steps in two slots: the first two, then the third beside the first, then the last.
NUM_PASSES = 7


class Died(BaseException):
    """Nothing catches it, so that nothing is saved, as if the process were gone."""


class Dies(Callback):
    """Ends the run after so many events of a kind; counts the steps it saw."""

    def __init__(self, event: str = "", after: int = 0, error: type[BaseException] = Died) -> None:
        self.event, self.left, self.error, self.num_steps = event, after, error, 0

    def on_step(self, steps: Any, losses: Any, tokens: int, seconds: float) -> None:
        self.num_steps += 1
        self._count("step")

    def on_eval(self, name: str, step: int, loss: float, adapters: Any) -> None:
        self._count("eval")

    def on_finish(self, unit: TrainedUnit) -> None:
        self._count("finish")

    def _count(self, event: str) -> None:
        self.left -= event == self.event
        if event == self.event and self.left == 0:
            raise self.error


def bits(units: Sequence[TrainedUnit]) -> dict[str, Any]:
    return {
        unit.name: (
            {path: (f.lora_a.tolist(), f.lora_b.tolist()) for path, f in unit.adapters[unit.name].items()},
            unit.train_losses,
            unit.val_losses,
            unit.best_step,
            unit.stopped_early,
        )
        for unit in units
    }


@pytest.fixture
def committed() -> list[TrainedUnit]:
    """What was handed over, in all runs."""
    return []


@pytest.fixture
def run(tiny_model: Make, random_examples: Make, committed: list[TrainedUnit], some_stack: Make) -> Make:
    """Run a queue of four units of unequal steps and ranks in two slots; the same in every test."""
    generator = torch.Generator().manual_seed(5)
    rows = {name: random_examples(9, generator, longest) for name, longest in zip("abcd", (7, 20, 12, 7), strict=True)}
    shapes = zip(rows.items(), (5, 2, 3, 2), (2, 2, 2, 1), strict=True)
    queue = [Job(name, own, own[:3], steps, rank, alpha=4.0) for (name, own), steps, rank in shapes]

    def train(settings: LoopSettings, *callbacks: Callback, checkpoint: Path | None = None) -> None:
        model = tiny_model()
        options: dict[str, Any] = {"on_finish": committed.append, "callbacks": callbacks, "checkpoint": checkpoint}
        train_queue(model, queue, some_stack(model, queue, 2), settings, **options)

    return train


_UNDISTURBED: dict[float, dict[str, Any]] = {}


@pytest.fixture
def undisturbed(run: Make, committed: list[TrainedUnit], loop_settings: Make) -> Callable[[float], dict[str, Any]]:
    """What the queue becomes when nothing happens, by dropout; trained once."""

    def make(dropout: float) -> dict[str, Any]:
        if dropout not in _UNDISTURBED:
            run(loop_settings(dropout=dropout, max_tokens=60))
            _UNDISTURBED[dropout] = bits(committed)
            committed.clear()
        return _UNDISTURBED[dropout]

    return make


@pytest.mark.parametrize(
    ("event", "after", "save_every_s"),
    [
        *(("step", n, 0.0) for n in range(1, 8)),
        *(("eval", n, 0.0) for n in (1, 4, 9)),
        *(("step", n, 1000.0) for n in (1, 3, 7)),
        *(("finish", n, 1000.0) for n in range(1, 5)),
    ],
)
def test_a_queue_killed_at_any_moment_ends_with_the_same_bits(
    run: Make, undisturbed: Make, committed: list[TrainedUnit], loop_settings: Make, tmp_path: Path,
    event: str, after: int, save_every_s: float,
) -> None:  # fmt: skip
    dropout = 0.2 * (after % 2)
    expected = undisturbed(dropout)
    settings = loop_settings(dropout=dropout, max_tokens=60, save_every_s=save_every_s)
    path = tmp_path / "build" / "queue.safetensors"
    with pytest.raises(Died):
        run(settings, Dies(event, after), checkpoint=path)
    early = bits(committed)
    committed.clear()
    count = Dies()
    run(settings, count, checkpoint=path)
    # Whatever was handed over before may be handed over again, and is the same then.
    late = bits(committed)
    assert {**early, **late} == expected
    assert all(early[name] == late[name] for name in early.keys() & late.keys())
    assert not path.exists()
    if save_every_s == 0 and event == "step":
        # A checkpoint is written before each step; the one that was killed after its step is done again.
        assert count.num_steps == NUM_PASSES - (after - 1)


@pytest.mark.parametrize("after", [2, 4])
def test_ctrl_c_saves_what_was_trained(
    run: Make, undisturbed: Make, committed: list[TrainedUnit], loop_settings: Make, tmp_path: Path, after: int
) -> None:
    expected = undisturbed(0.0)
    settings = loop_settings(save_every_s=1000.0, max_tokens=60)
    path, count = tmp_path / "queue.safetensors", Dies()
    with pytest.raises(KeyboardInterrupt):
        run(settings, Dies("step", after, KeyboardInterrupt), checkpoint=path)
    run(settings, count, checkpoint=path)
    assert count.num_steps == NUM_PASSES - after
    assert bits(committed) == expected


def test_an_interrupt_in_the_middle_of_an_update_keeps_the_checkpoint_before_it(
    run: Make, undisturbed: Make, committed: list[TrainedUnit], loop_settings: Make, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    expected = undisturbed(0.0)
    settings = loop_settings(save_every_s=0.0, max_tokens=60)
    original, calls = SlotwiseAdamW.step, []

    def step(self: SlotwiseAdamW, slot: int, *args: Any) -> Any:
        calls.append(slot)
        if len(calls) == 6:  # the second slot of the third step
            raise KeyboardInterrupt
        return original(self, slot, *args)

    path = tmp_path / "queue.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(SlotwiseAdamW, "step", step)
        with pytest.raises(KeyboardInterrupt):
            run(settings, checkpoint=path)
    run(settings, checkpoint=path)
    assert bits(committed) == expected


SCRIPT = """
import sys
import warnings
warnings.simplefilter("ignore")
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from lorary.data.template import Example
from lorary.lora.targets import find_targets
from lorary.train.loop import train_queue
from lorary.train.optimiser import OptimiserSettings
from lorary.train.stack import expert_stack
from lorary.train.optimiser import SlotwiseAdamW
from lorary.train.units import Job, LoopSettings
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2)).requires_grad_(False).eval()
def job(name, steps):
    rows = [Example(tuple(torch.randint(1, 50, (i % 7 + 2,)).tolist()), (i + 1, 0), 0) for i in range(9)]
    return Job(name, rows, rows[:2], steps, rank=2, alpha=2.0)
jobs = [job(name, steps) for name, steps in (("a", 30), ("b", 60), ("c", 45))]
out = Path(sys.argv[1])
def commit(unit):
    text = repr([(p, f.lora_a.tolist(), f.lora_b.tolist()) for p, f in unit.adapters[unit.name].items()])
    (out / unit.name).write_text(text + repr(unit.train_losses) + repr(unit.val_losses))
settings = LoopSettings(OptimiserSettings(0.05), batch_size=2, save_every_s=0.0, dropout=0.1)
stack = expert_stack(model, find_targets(model, ["q_proj", "down_proj"]), jobs, 2)
print("ready", flush=True)
train_queue(model, jobs, stack, settings, checkpoint=out / "queue.safetensors", on_finish=commit)
"""


def start(folder: Path) -> "subprocess.Popen[str]":
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.stdout.close()
    return process


def results(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if len(path.name) == 1}


@pytest.mark.slow
def test_a_process_killed_again_and_again_ends_with_the_same_bits(tmp_path: Path, generator: torch.Generator) -> None:
    process = start(tmp_path / "whole")
    began = time.monotonic()
    assert process.wait() == 0
    lasted = time.monotonic() - began
    for _ in range(5):
        process = start(tmp_path / "killed")
        time.sleep(float(torch.rand((), generator=generator)) * lasted / 3)
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = start(tmp_path / "killed")
    assert process.wait() == 0
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    assert sorted(results(tmp_path / "killed")) == ["a", "b", "c"]
