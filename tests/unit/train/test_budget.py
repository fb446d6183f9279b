"""Tokens of a micro-batch: halved where memory runs out, measured for `auto`, recorded, and taken up after a kill."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorary.errors import TrainError
from lorary.ops.memory import is_out_of_memory
from lorary.train import budget, flat, forward
from lorary.train.budget import CudaMeter, meter_for
from lorary.train.callbacks import Callback, Halt
from lorary.train.loop import smaller_budget
from lorary.train.optimiser import SlotwiseAdamW
from lorary.train.units import Job, TrainedUnit

Make = Callable[..., Any]
STEPS, REQUESTED = 4, 60


class Watch(Callback):
    """Keeps what is said of the budget, counts steps, and halts after so many."""

    def __init__(self, halt_after: int = 0) -> None:
        self.halt_after, self.num_steps, self.said = halt_after, 0, list[tuple[int, str]]()

    def on_budget(self, max_tokens: int, reason: str) -> None:
        self.said.append((max_tokens, reason))

    def on_step(self, steps: Any, losses: Any, tokens: int, seconds: float) -> None:
        self.num_steps += 1
        if self.num_steps == self.halt_after:
            raise Halt


def bits(units: Sequence[TrainedUnit]) -> dict[str, Any]:
    return {
        unit.name: (
            {path: (f.lora_a.tolist(), f.lora_b.tolist()) for path, f in unit.adapters[unit.name].items()},
            unit.train_losses,
            unit.val_losses,
        )
        for unit in units
    }


@pytest.fixture
def run(tiny_model: Make, random_examples: Make, train: Make, loop_settings: Make) -> Make:
    """Train two experts of four steps: `run(watch, checkpoint=path, max_tokens=60)` -> bits."""
    generator = torch.Generator().manual_seed(5)
    rows = {name: random_examples(9, generator, longest) for name, longest in (("a", 8), ("b", 18))}
    queue = [Job(name, own, own[:3], STEPS, rank=2, alpha=4.0) for name, own in rows.items()]

    def run_queue(watch: Watch | None = None, checkpoint: Path | None = None, **changes: Any) -> dict[str, Any]:
        settings = loop_settings(**{"max_tokens": REQUESTED, "save_every_s": 1000.0, **changes})
        return bits(train(tiny_model(), queue, settings, checkpoint=checkpoint, callbacks=[watch] if watch else []))

    return run_queue


@pytest.fixture
def exhaust(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Let memory run out: `exhaust(above=30)` at every micro-batch of more tokens, `times` or each time."""

    def arm(above: int, times: int = 10**6, error: BaseException | None = None) -> None:
        original, left = forward.target_losses, [times]

        def losses(model: Any, batch: Any) -> Any:
            computed = original(model, batch)
            if batch.input_ids.numel() > above and left[0]:
                left[0] -= 1
                raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand more")
            return computed

        monkeypatch.setattr(forward, "target_losses", losses)

    return arm


class Exhausts(Watch):
    """Lets memory run out in every step after the second."""

    def __init__(self, exhaust: Make, **options: Any) -> None:
        super().__init__()
        self.exhaust, self.options = exhaust, options

    def on_step(self, steps: Any, losses: Any, tokens: int, seconds: float) -> None:
        super().on_step(steps, losses, tokens, seconds)
        if self.num_steps == 2:
            self.exhaust(**self.options)


@pytest.fixture
def halved(run: Make, tmp_path: Path) -> dict[str, Any]:
    """What becomes of the queue where half the budget is asked for after two steps."""
    path = tmp_path / "halved.safetensors"
    with pytest.raises(Halt):
        run(Watch(halt_after=2), checkpoint=path)
    again = Watch()
    result: dict[str, Any] = run(again, checkpoint=path, max_tokens=REQUESTED // 2)
    assert (again.num_steps, again.said) == (STEPS - 2, [])
    return result


@pytest.mark.parametrize("error", [None, RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")])
def test_a_step_that_does_not_fit_is_done_again_at_half_the_budget_and_so_are_all_that_follow(
    run: Make, halved: dict[str, Any], exhaust: Make, tmp_path: Path, error: Exception | None
) -> None:
    assert halved != run()  # micro-batches decide the rounding
    watch = Exhausts(exhaust, above=30, error=error)
    assert run(watch, checkpoint=tmp_path / "queue.safetensors") == halved
    ((tokens, reason),) = watch.said
    assert tokens == REQUESTED // 2
    assert reason.startswith("60 did not fit the memory of cpu (")
    assert "\n" not in reason
    assert watch.num_steps == STEPS


def test_a_backward_pass_that_breaks_off_leaves_no_gradient_behind(
    run: Make, halved: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, watch, left = flat._move_gradient, Watch(), [1]

    def move(into: torch.Tensor, leaf: torch.Tensor) -> None:
        if watch.num_steps == 2 and left[0]:
            left[0] = 0
            raise torch.OutOfMemoryError("no memory left")
        original(into, leaf)

    monkeypatch.setattr(flat, "_move_gradient", move)
    assert run(watch) == halved
    assert left == [0]


def test_a_run_killed_after_it_came_down_goes_on_with_the_smaller_budget(
    run: Make, halved: dict[str, Any], exhaust: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Dies(Exhausts):
        def on_step(self, steps: Any, losses: Any, tokens: int, seconds: float) -> None:
            super().on_step(steps, losses, tokens, seconds)
            if self.num_steps == 3:
                raise ZeroDivisionError  # nothing is saved, as if the process were gone

    path = tmp_path / "queue.safetensors"
    with monkeypatch.context(), pytest.raises(ZeroDivisionError):
        run(Dies(exhaust, above=30, times=1), checkpoint=path)
    monkeypatch.undo()  # memory is plenty again
    again = Watch()
    assert run(again, checkpoint=path) == halved
    assert again.num_steps == STEPS - 2  # the checkpoint was written where the budget changed
    assert again.said == [(REQUESTED // 2, "as recorded before the interruption")]


def test_another_number_that_is_asked_for_replaces_the_recorded_one(run: Make, exhaust: Make, tmp_path: Path) -> None:
    path, watch = tmp_path / "queue.safetensors", Watch()
    exhaust(above=30, times=1)
    with pytest.raises(Halt):
        run(Watch(halt_after=1), checkpoint=path)
    run(watch, checkpoint=path, max_tokens=61)
    assert watch.said == []


@pytest.mark.parametrize("requested", [REQUESTED, 1])
def test_where_one_row_alone_does_not_fit_the_error_names_ways_out_and_nothing_is_lost(
    run: Make, exhaust: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, requested: int
) -> None:
    path, watch = tmp_path / "queue.safetensors", Exhausts(exhaust, above=3)
    with monkeypatch.context(), pytest.raises(TrainError) as caught:
        run(watch, checkpoint=path, max_tokens=requested)
    assert caught.value.rule.startswith("a row of ")
    assert caught.value.rule.endswith(" tokens must fit the memory of cpu")
    assert caught.value.found == "CUDA out of memory. Tried to allocate 2.00 GiB."
    assert str(caught.value.remedy).startswith("--activation-checkpointing, a smaller --window")
    tokens = [tokens for tokens, _ in watch.said]
    assert tokens == [requested // 2**n for n in range(1, len(tokens) + 1)]
    monkeypatch.undo()
    again = Watch()
    run(again, checkpoint=path, max_tokens=requested)
    assert again.num_steps == STEPS - 2


def test_an_update_without_memory_is_one_clear_error(run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*_args: Any) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(SlotwiseAdamW, "step", step)
    with pytest.raises(TrainError, match=r"the update of the experts .* must fit the memory of cpu\n.*no memory left"):
        run(activation_checkpointing=True)


def test_other_errors_are_not_taken_for_a_lack_of_memory(run: Make, exhaust: Make) -> None:
    exhaust(above=3, error=RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        run()


@given(st.integers(2, 10**6), st.integers(0, 10**6))
def test_the_smaller_budget_is_the_largest_half_that_cuts_what_did_not_fit(tokens: int, more: int) -> None:
    before = tokens + more
    after = smaller_budget(before, tokens)
    assert 1 <= after < tokens <= 2 * after + 1
    assert any(before >> halvings == after for halvings in range(1, 21))


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("shapes"), False),
        (ValueError("out of memory"), False),
        (TrainError("it must fit", found="CUDA out of memory"), False),
    ],
)
def test_errors_of_memory_are_told_from_others(error: Exception, is_memory: bool) -> None:
    assert is_out_of_memory(error) is is_memory


# --- auto


class FakeMeter:
    """A device on which a token of a micro-batch takes 10 bytes; every look at it is counted."""

    def __init__(self, free: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free, self.largest, self.looks = free, 0, 0
        original = forward.target_losses

        def losses(model: Any, batch: Any) -> Any:
            self.largest = max(self.largest, batch.input_ids.numel())
            return original(model, batch)

        monkeypatch.setattr(forward, "target_losses", losses)
        monkeypatch.setattr(budget, "meter_for", lambda device: self)
        monkeypatch.setattr(budget, "MICRO_TOKENS", 16)

    def available(self) -> int:
        return self.free

    def peak(self, work: Callable[[], None]) -> int:
        self.looks, self.largest = self.looks + 1, 0
        work()
        return 10 * self.largest


@pytest.mark.parametrize(
    ("free", "tokens"),
    [(313, 16), (563, 32), (1125, 64), (10**6, 128), (0, 16 // 2)],
)
def test_auto_takes_the_largest_micro_batches_that_leave_a_fifth_of_the_memory_free(
    run: Make, monkeypatch: pytest.MonkeyPatch, free: int, tokens: int
) -> None:
    watch = Watch()
    with monkeypatch.context() as patch:
        FakeMeter(free, patch)
        measured = run(watch, max_tokens=None)
    ((chosen, reason),) = watch.said
    assert chosen == tokens
    assert reason.startswith("measured, as ")
    assert reason.endswith(" GiB may be used for it on cpu")
    assert measured == run(max_tokens=tokens)  # what was tried out has left no trace


def test_a_trial_without_memory_only_says_that_so_much_does_not_fit(
    run: Make, exhaust: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch()
    FakeMeter(10**6, monkeypatch)
    exhaust(above=32)
    run(watch, max_tokens=None)
    assert [tokens for tokens, _ in watch.said] == [32]


def test_a_resumed_run_takes_what_was_measured_and_measures_nothing(
    run: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, again = tmp_path / "queue.safetensors", Watch()
    meter = FakeMeter(800, monkeypatch)
    undisturbed, looks = run(max_tokens=None), meter.looks
    with pytest.raises(Halt):
        run(Watch(halt_after=1), checkpoint=path, max_tokens=None)
    assert meter.looks == 2 * looks
    meter.free = 10**6  # somebody else has left the device
    assert run(again, checkpoint=path, max_tokens=None) == undisturbed
    assert meter.looks == 2 * looks
    assert again.said == [(64, "as recorded before the interruption")]


def test_a_run_killed_before_its_first_step_has_recorded_what_it_measured(
    run: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Dies(Watch):
        def on_budget(self, max_tokens: int, reason: str) -> None:
            raise ZeroDivisionError

    path, again = tmp_path / "queue.safetensors", Watch()
    meter = FakeMeter(800, monkeypatch)
    with pytest.raises(ZeroDivisionError):
        run(Dies(), checkpoint=path, max_tokens=None)
    meter.free = 0
    run(again, checkpoint=path, max_tokens=None)
    assert [tokens for tokens, _ in again.said] == [64]


def test_on_the_cpu_auto_is_the_default(run: Make) -> None:
    watch = Watch()
    assert run(watch, max_tokens=None) == run(max_tokens=1024)
    assert watch.said == [(1024, "the default, since memory is not measured on cpu")]
    assert meter_for(torch.device("cpu")) is None
    assert meter_for(torch.device("mps")) is None


def test_a_cuda_device_is_measured_by_what_torch_reserves(monkeypatch: pytest.MonkeyPatch) -> None:
    device, reserved, calls = torch.device("cuda:1"), SimpleNamespace(now=300, most=300), []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (7000, 9000) if place == device else (0, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda place: reserved.now)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda place: reserved.most)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda place: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda place: calls.append("wait"))
    meter = meter_for(device)
    assert isinstance(meter, CudaMeter)
    assert meter.available() == 7000
    assert meter.peak(lambda: setattr(reserved, "most", 1700)) == 1400
    assert calls == ["empty", "empty", "reset", "wait"]
