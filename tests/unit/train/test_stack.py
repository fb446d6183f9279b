"""The stack: views into one vector, initial weights that know nothing of the neighbours, and zeros that stay zero."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from lorary.data.template import Example
from lorary.errors import TrainError
from lorary.train.stack import ExpertStack
from lorary.train.units import Job

TARGETS = {"q_proj": (6, 5), "o_proj": (4, 6)}
ROW = Example((1, 2), (3,), 0)


def job(name: str, **changes: Any) -> Job:
    return replace(Job(name, [ROW], [ROW], num_steps=1, rank=2, alpha=8.0), **changes)


def stack_of(*jobs: Job, init: str = "shared", seed: int = 0, rank: int = 2) -> ExpertStack:
    stack = ExpertStack(len(jobs), TARGETS, rank, torch.float64, torch.device("cpu"))
    for slot, member in enumerate(jobs):
        stack.fill(slot, member, seed, init, 1.0)
    return stack


def test_factors_and_gradients_are_views_into_one_vector() -> None:
    stack = stack_of(job("a"), job("b"))
    assert stack.parameters.numel() == 2 * (2 * 6 + 5 * 2 + 2 * 4 + 6 * 2)
    assert [tuple(block.shape) for block in stack.blocks(stack.parameters)] == [(2, 12), (2, 10), (2, 8), (2, 12)]
    stack.parameters.fill_(7.0)
    for module in stack.modules.values():
        assert (module.lora_a == 7).all()
        (module.lora_a.sum() + 2 * module.lora_b.sum()).backward()
    assert [block.unique().tolist() for block in stack.blocks(stack.gradient)] == [[1], [2], [1], [2]]


def test_the_vector_holds_slot_after_slot() -> None:
    stack = stack_of(job("a"), job("b"))
    stack.parameters.view(2, -1)[1].fill_(5.0)
    for module in stack.modules.values():
        assert (module.lora_a[1] == 5).all()
        assert (module.lora_b[1] == 5).all()
        assert not (module.lora_a[0] == 5).any()


def test_a_result_is_a_copy_with_the_scaling_of_its_job() -> None:
    stack = stack_of(job("a"), job("b", alpha=6.0))
    (factors,) = stack.result(1, job("b", alpha=6.0), stack.parameters).adapters.values()
    assert list(factors) == ["q_proj", "o_proj"]
    assert (factors["o_proj"].d_in, factors["o_proj"].d_out, factors["o_proj"].scaling) == (4, 6, 3.0)
    before = factors["q_proj"].lora_a.clone()
    stack.parameters.zero_()
    assert torch.equal(factors["q_proj"].lora_a, before)


def test_an_expert_of_smaller_rank_and_fewer_layers_gets_its_own_shapes_back() -> None:
    small = job("small", rank=1, targets=frozenset({"o_proj"}))
    stack = stack_of(job("a", rank=3), small, init="own", rank=3)
    assert stack.scaling.tolist() == [8 / 3, 8.0]
    (factors,) = stack.result(1, small, stack.parameters).adapters.values()
    assert {path: f.rank for path, f in factors.items()} == {"o_proj": 1}
    alone = stack_of(small, init="own", rank=1)
    assert torch.equal(factors["o_proj"].lora_a, alone.modules["o_proj"].lora_a[0])
    stack.parameters.fill_(1.0)
    stack.fill(1, small, 0, "own", 1.0)
    assert stack.parameters.view(2, -1)[1].count_nonzero() == 4


@pytest.mark.parametrize("changes", [{"rank": 3}, {"targets": frozenset({"q_proj", "gate_proj"})}])
def test_a_job_that_does_not_fit_is_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(TrainError, match=r"expert 'big' must fit a stack of rank 2 over 2 layers\nfound: rank"):
        stack_of(job("big", **changes))


def test_initial_weights_depend_on_seed_layer_and_name_alone() -> None:
    own = stack_of(job("a"), job("b"), init="own")
    alone, other_order = stack_of(job("b"), init="own"), stack_of(job("b"), job("c"), job("a"), init="own")
    for path, module in own.modules.items():
        assert torch.equal(module.lora_a[1], alone.modules[path].lora_a[0])
        assert torch.equal(module.lora_a[0], other_order.modules[path].lora_a[2])
        assert not torch.equal(module.lora_a[0], module.lora_a[1])
        assert (module.lora_b == 0).all()
    other_seed = stack_of(job("a"), init="own", seed=1)
    assert not torch.equal(other_seed.parameters, stack_of(job("a"), init="own").parameters)


def test_a_shared_draw_is_one_for_the_whole_library() -> None:
    stack = stack_of(job("a"), job("b"))
    for path, module in stack.modules.items():
        assert torch.equal(module.lora_a[0], module.lora_a[1])
        assert torch.equal(module.lora_a[0], stack_of(job("z")).modules[path].lora_a[0])


def test_initial_weights_fill_the_bound_of_peft_times_the_scale() -> None:
    stack = ExpertStack(1, {"q_proj": (100, 5)}, 8, torch.float32, torch.device("cpu"))
    stack.fill(0, job("a", rank=8), 0, "own", 0.5)
    lora_a = stack.modules["q_proj"].lora_a
    assert 0.049 < lora_a.max() < 0.05
    assert -0.05 < lora_a.min() < -0.049
    assert lora_a.mean().abs() < 0.005


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": []}, r"at least one row to train on .*\nfound: 0 and 1"),
        ({"val": []}, r"at least one row to train on .*\nfound: 1 and 0"),
        ({"num_steps": 0}, "at least one step"),
        ({"train_tasks": [0, 1]}, "one task number for each row"),
        ({"task_weights": [1.0, 1.0]}, "one sampling weight above 0 for each task"),
        ({"task_weights": [0.0]}, "one sampling weight above 0 for each task"),
        ({"task_weights": [float("nan")]}, "one sampling weight above 0 for each task"),
    ],
)
def test_a_job_that_cannot_be_trained_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=f"expert 'a' needs {message}"):
        job("a", **changes)
