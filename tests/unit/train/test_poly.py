"""Poly in the training loop: tasks are told apart, one skill is one expert, a killed run ends with the same bits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorary.data.template import Example
from lorary.errors import ShapeError, TrainError
from lorary.lora.poly import mixing_weights
from lorary.lora.targets import find_targets
from lorary.train.callbacks import Callback
from lorary.train.loop import train_queue
from lorary.train.optimiser import OptimiserSettings, SlotwiseAdamW
from lorary.train.poly import LOGITS_BOUND, PolyStack, skill_names
from lorary.train.stack import expert_stack
from lorary.train.units import Job, LoopSettings, TrainedUnit

Make = Callable[..., Any]


def some_targets(model: Any) -> dict[str, tuple[int, int]]:
    return find_targets(model, ["v_proj", "down_proj"])


def stack_for(model: Any, **changes: Any) -> PolyStack:
    settings = {
        "num_tasks": 2, "num_skills": 3, "num_splits": 1, "rank": 2, "scaling": 2.0, "logits_rate": 5.0,
        "dtype": model.dtype, "device": torch.device("cpu"),
    }  # fmt: skip
    return PolyStack(some_targets(model), **{**settings, **changes})


def opposite_tasks(num_prompts: int = 6, **changes: Any) -> Job:
    """The same prompts with one answer in one task and another in the other: nothing but the task can tell them."""
    prompts = [tuple(range(20 + 3 * number, 24 + 3 * number)) for number in range(num_prompts)]
    rows = [Example(prompt, (answer,), truncated=0) for prompt in prompts for answer in (7, 8)]
    tasks = [0, 1] * num_prompts
    job = Job("poly", rows, rows, num_steps=6, rank=2, alpha=4.0, train_tasks=tasks, val_tasks=tasks)
    return replace(job, **changes)


@pytest.fixture
def settings() -> LoopSettings:
    optimiser = OptimiserSettings(learning_rate=0.02, clip=0.3, weight_decay=0.01)
    return LoopSettings(optimiser, batch_size=6, num_evals=2, init="own", max_tokens=10_000, save_every_s=0.0)


def train(model: Any, job: Job, stack: Any, settings: LoopSettings, **options: Any) -> TrainedUnit:
    units: list[TrainedUnit] = []
    train_queue(model, [job], stack, settings, on_finish=units.append, **options)
    (unit,) = units
    return unit


def everything(unit: TrainedUnit) -> torch.Tensor:
    factors = [t for a in unit.adapters.values() for f in a.values() for t in (f.lora_a, f.lora_b)]
    return torch.cat([t.flatten() for t in (*factors, *unit.extras.values())])


@pytest.mark.parametrize("splits", [1, 2])
def test_two_opposite_tasks_are_told_apart(tiny_model: Make, settings: LoopSettings, splits: int) -> None:
    model = tiny_model()
    job, fast = opposite_tasks(num_steps=20), replace(settings, optimiser=OptimiserSettings(0.1, clip=0.3), num_evals=1)
    poly = train(model, job, stack_for(model, num_splits=splits), fast)
    alone = train(model, job, stack_for(model, num_skills=1, num_splits=splits), fast)
    # Two answers to one prompt cost ln 2 = 0.69 at least on top of the loss that either answer could be given with.
    assert poly.val_losses[-1][1] < alone.val_losses[-1][1] - 0.69
    weights = torch.stack([mixing_weights(logits) for logits in poly.extras.values()])
    assert (weights[:, 0] - weights[:, 1]).abs().amax() > 0.3


def test_one_skill_is_trained_as_one_expert_is(tiny_model: Make, settings: LoopSettings) -> None:
    model = tiny_model(dtype=torch.float64)
    # Under the skill's name, which keys the initial weights.
    job = opposite_tasks(name="skill_0")
    poly = train(model, job, stack_for(model, num_skills=1), settings)
    expert = train(model, job, expert_stack(model, some_targets(model), [job], 1), settings)
    assert poly.train_losses == pytest.approx(expert.train_losses, rel=1e-6)
    for path, factors in expert.adapters["skill_0"].items():
        found = poly.adapters["skill_0"][path]
        assert found.scaling == factors.scaling
        # The weight of the one skill is 1 - 2e-8; AdamW carries that on.
        assert torch.allclose(found.lora_a, factors.lora_a, rtol=0, atol=1e-5)
        assert torch.allclose(found.lora_b, factors.lora_b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("max_tokens", [14])
def test_micro_batches_change_nothing_but_rounding(tiny_model: Make, settings: LoopSettings, max_tokens: int) -> None:
    model = tiny_model(dtype=torch.float64)
    job, dropping = opposite_tasks(), replace(settings, dropout=0.2)
    whole = train(model, job, stack_for(model), dropping)
    cut = train(model, job, stack_for(model), replace(dropping, max_tokens=max_tokens))
    assert (everything(whole) - everything(cut)).norm() < 1e-9 * everything(whole).norm()


@pytest.mark.parametrize("killed_at", [1, 4])
def test_a_run_killed_after_any_step_resumes_to_the_same_bits(
    tiny_model: Make, settings: LoopSettings, tmp_path: Path, killed_at: int
) -> None:
    model, dropping = tiny_model(), replace(settings, dropout=0.2)
    undisturbed = train(model, opposite_tasks(), stack_for(model), dropping)

    class Die(Callback):
        def on_step(self, steps: Any, losses: Any, tokens: int, seconds: float) -> None:
            if steps["poly"] == killed_at:
                raise RuntimeError("killed")

    checkpoint = tmp_path / "poly.safetensors"
    with pytest.raises(RuntimeError, match="killed"):
        train(model, opposite_tasks(), stack_for(model), dropping, checkpoint=checkpoint, callbacks=[Die()])
    resumed = train(model, opposite_tasks(), stack_for(model), dropping, checkpoint=checkpoint)
    assert torch.equal(everything(resumed), everything(undisturbed))
    assert (resumed.train_losses, resumed.val_losses) == (undisturbed.train_losses, undisturbed.val_losses)


def test_logits_learn_at_their_own_rate_and_are_not_decayed(tiny_model: Make) -> None:
    stack = stack_for(tiny_model(dtype=torch.float64), logits_rate=4.0)
    stack.fill(0, opposite_tasks(), 0, "own", 1.0)
    before = stack.parameters.clone()
    sizes = [block.shape[1] for block in stack.blocks(stack.parameters)]
    scales = list(zip(sizes, stack.rate_scales(), strict=True))
    settings = OptimiserSettings(learning_rate=0.01, weight_decay=0.5, clip=1e9)
    stack.gradient.fill_(3.0)
    SlotwiseAdamW(stack.parameters, stack.gradient, 1, settings, scales).step(0, 0, 1)
    num_logits = sum(module.logits.numel() for module in stack.modules.values())
    # AdamW's first step has the size of the rate, whatever the gradient.
    expected = torch.cat([before[:-num_logits] * (1 - 0.01 * 0.5) - 0.01, before[-num_logits:] - 4.0 * 0.01])
    assert torch.allclose(stack.parameters, expected, rtol=0, atol=1e-9)


def test_initial_weights_depend_on_seed_skill_and_layer_alone(tiny_model: Make) -> None:
    model = tiny_model()
    small, large = stack_for(model), stack_for(model, num_skills=5, num_tasks=4)
    for stack in (small, large):
        stack.parameters.normal_()
        stack.fill(0, opposite_tasks(), 0, "own", 1.0)
    for path, module in small.modules.items():
        other = large.modules[path]
        assert torch.equal(module.lora_a, other.lora_a[:3])
        assert not torch.equal(module.lora_a[0], module.lora_a[1])
        assert not module.lora_b.any()
        assert 0 < module.logits.abs().max() <= LOGITS_BOUND
        bound = module.lora_a.shape[-1] ** -0.5
        assert 0.8 * bound < module.lora_a.abs().max() <= bound
    small.fill(0, opposite_tasks(), 1, "own", 1.0)
    assert not torch.equal(small.parameters[:100], large.parameters[:100])


def test_blocks_cover_the_vector_in_order(tiny_model: Make) -> None:
    stack = stack_for(tiny_model())
    vector = torch.arange(stack.parameters.numel())
    assert torch.equal(torch.cat([block[0] for block in stack.blocks(vector)]), vector)
    shapes = [tensor.shape for module in stack.modules.values() for tensor in (module.lora_a, module.lora_b)]
    shapes += [module.logits.shape for module in stack.modules.values()]
    assert [tensor.shape for tensor in stack.tensors(vector)] == shapes


def test_the_result_is_a_copy_of_skills_and_logits(tiny_model: Make) -> None:
    stack = stack_for(tiny_model(), num_splits=2)
    stack.parameters.normal_(generator=torch.Generator().manual_seed(0))
    found = stack.result(0, opposite_tasks(), stack.parameters)
    path, module = next(iter(stack.modules.items()))
    assert tuple(found.adapters) == skill_names(3) == ("skill_0", "skill_1", "skill_2")
    assert torch.equal(found.adapters["skill_2"][path].lora_b, module.lora_b[2])
    assert torch.equal(found.extras[path], module.logits)
    assert found.adapters["skill_0"][path].scaling == 2.0
    kept = found.extras[path].clone()
    stack.parameters.zero_()
    assert torch.equal(found.extras[path], kept)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in found.extras.values())


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"rank": 3}, "rank 2"),
        ({"alpha": 1.0}, "scaling 2.0"),
        ({"targets": frozenset({"model.layers.0.mlp.down_proj"})}, "all layers of the stack"),
        ({"val_tasks": [0, 2] * 6}, "task numbers below 2"),
    ],
)
def test_a_job_that_does_not_fit_is_refused_by_name(tiny_model: Make, changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(TrainError, match=f"the model 'poly' needs {rule}"):
        stack_for(tiny_model()).fill(0, opposite_tasks(**changes), 0, "own", 1.0)


def test_a_layer_that_splits_do_not_divide_is_refused_by_name(tiny_model: Make) -> None:
    with pytest.raises(ShapeError, match=r"layer 'model.layers.0.*' into equal blocks\nfound: 5 splits of d_in 32"):
        stack_for(tiny_model(), num_splits=5)
