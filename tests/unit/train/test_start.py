"""Training that begins with given factors: nothing is lost of them, and a kill changes nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorary.adapter import LoraFactors
from lorary.data.template import Example
from lorary.errors import TrainError
from lorary.train.callbacks import Callback
from lorary.train.stack import ExpertStack
from lorary.train.units import Factors, Job

TARGETS = {"q_proj": (6, 5), "o_proj": (4, 6)}
ROW = Example((1, 2), (3,), 0)
Make = Callable[..., Any]


def factors_of(rank: int, scaling: float, seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {path: LoraFactors(draw(rank, i), draw(o, rank), scaling) for path, (i, o) in TARGETS.items()}


def job(start: Factors, **changes: Any) -> Job:
    rank = next(iter(start.values())).rank
    plain = Job("a", [ROW], [ROW], num_steps=0, rank=rank, alpha=8.0, start=start)
    return replace(plain, **changes)


def filled(member: Job, slots: int = 2) -> ExpertStack:
    stack = ExpertStack(slots, TARGETS, 5, torch.float64, torch.device("cpu"))
    stack.fill(1, member, 0, "own", 1.0)
    return stack


@given(rank=st.integers(1, 3), more=st.integers(0, 2), alpha=st.floats(0.5, 32), scaling=st.floats(0.1, 8))
def test_a_slot_that_begins_with_an_adapter_computes_what_that_does(
    rank: int, more: int, alpha: float, scaling: float
) -> None:
    start = factors_of(rank, scaling)
    member = job(start, rank=rank + more, alpha=alpha)
    (made,) = filled(member).result(1, member, filled(member).parameters).adapters.values()
    for path, factors in start.items():
        assert made[path].rank == rank + more
        assert torch.allclose(made[path].delta(), factors.delta(), rtol=1e-12, atol=1e-12)
        # What the start leaves free is drawn, so that it can learn.
        assert made[path].lora_a[rank:].all()


def test_a_start_of_the_jobs_own_rank_and_scaling_is_kept_bit_for_bit() -> None:
    start = factors_of(2, 4.0)
    member = job(start)
    stack = filled(member)
    (made,) = stack.result(1, member, stack.parameters).adapters.values()
    for path, factors in start.items():
        assert torch.equal(made[path].lora_a, factors.lora_a)
        assert torch.equal(made[path].lora_b, factors.lora_b)
    assert not stack.parameters.view(2, -1)[0].any()


@pytest.mark.parametrize("changes", [{"rank": 1}, {"targets": frozenset({"q_proj"})}])
def test_a_start_that_does_not_fit_is_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(TrainError, match=r"the start of expert 'a' must fit its rank . and its . layers\nfound: layer"):
        filled(job(factors_of(2, 4.0), **changes))


def test_only_a_job_with_a_start_may_take_no_step() -> None:
    with pytest.raises(TrainError, match="at least one step"):
        replace(job(factors_of(1, 1.0)), start=None)


@pytest.fixture
def starting(jobs: list[Job], train: Make, tiny_model: Make, loop_settings: Make) -> list[Job]:
    """The jobs of all tests of training, each beginning with what it has become before."""
    short = [replace(job, num_steps=4) for job in jobs]
    units = {unit.name: unit for unit in train(tiny_model(), short, loop_settings())}
    return [replace(job, start=units[job.name].adapters[job.name]) for job in short]


def test_no_step_at_all_gives_the_start_and_its_loss(
    starting: list[Job], train: Make, tiny_model: Make, loop_settings: Make
) -> None:
    before = {job.name: job.start for job in starting}
    units = train(tiny_model(), [replace(job, num_steps=0) for job in starting], loop_settings())
    assert {unit.name for unit in units} == set(before)
    for unit in units:
        assert [step for step, _ in unit.val_losses] == [0]
        start = before[unit.name]
        assert start is not None
        for path, factors in unit.adapters[unit.name].items():
            assert torch.equal(factors.lora_a, start[path].lora_a)
            assert torch.equal(factors.lora_b, start[path].lora_b)


class Died(BaseException):
    pass


class Dies(Callback):
    """Ends the run after its third step."""

    left = 3

    def on_step(self, *_args: Any) -> None:
        self.left -= 1
        if not self.left:
            raise Died


def test_a_start_that_is_killed_ends_with_the_same_bits(
    starting: list[Job], train: Make, tiny_model: Make, loop_settings: Make, tmp_path: Path
) -> None:
    whole = train(tiny_model(), starting, loop_settings(), slots=2)
    path = tmp_path / "queue.safetensors"
    with pytest.raises(Died):
        train(tiny_model(), starting, loop_settings(), slots=2, checkpoint=path, callbacks=[Dies()])
    # Another start is another queue, and its checkpoint is none of this one's.
    others = [replace(job, start=starting[0].start) for job in starting]
    with pytest.raises(TrainError, match="must be one of this build"):
        train(tiny_model(), others, loop_settings(), slots=2, checkpoint=path)
    resumed = train(tiny_model(), starting, loop_settings(), slots=2, checkpoint=path)
    assert [unit.name for unit in resumed] == [unit.name for unit in whole]
    for one, other in zip(whole, resumed, strict=True):
        assert one.val_losses == other.val_losses
        for path_, factors in one.adapters[one.name].items():
            assert torch.equal(factors.lora_b, other.adapters[one.name][path_].lora_b)
