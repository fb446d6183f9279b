"""Training: together equals alone, whatever the company, ranks, lengths and ends; and a broken loss is named."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.adapter import Adapter
from lorary.data.batching import collate
from lorary.errors import TrainError, UsageError
from lorary.formats.peft_config import new_config
from lorary.model.logits import target_losses
from lorary.train.callbacks import Callback
from lorary.train.loop import train_queue
from lorary.train.onednn import packed_bytes
from lorary.train.optimiser import OptimiserSettings
from lorary.train.units import Job, TrainedUnit

Make = Callable[..., Any]


def vector(unit: TrainedUnit) -> Tensor:
    (factors,) = unit.adapters.values()
    return torch.cat([t.flatten() for f in factors.values() for t in (f.lora_a, f.lora_b)])


def assert_equal_training(one: TrainedUnit, other: TrainedUnit, tolerance: float) -> None:
    assert (one.name, one.best_step, one.stopped_early) == (other.name, other.best_step, other.stopped_early)
    assert one.train_losses == pytest.approx(other.train_losses, rel=tolerance)
    assert [step for step, _ in one.val_losses] == [step for step, _ in other.val_losses]
    assert [loss for _, loss in one.val_losses] == pytest.approx([v for _, v in other.val_losses], rel=tolerance)
    assert (vector(one) - vector(other)).norm() < tolerance * vector(other).norm()


def by_name(units: Sequence[TrainedUnit]) -> dict[str, TrainedUnit]:
    return {unit.name: unit for unit in units}


@pytest.mark.parametrize(
    ("max_tokens", "dropout", "init"),
    [(10_000, 0.0, "shared"), (10_000, 0.3, "own"), (70, 0.3, "own"), (45, 0.0, "shared"), (1, 0.3, "own")],
)
def test_training_together_equals_training_alone(
    tiny_model: Make, jobs: list[Job], loop_settings: Make, train: Make, max_tokens: int, dropout: float, init: str
) -> None:
    # The budgets: one micro-batch for all; some experts share one; most split their rows; one row at a time.
    model = tiny_model(dtype=torch.float64)
    settings = loop_settings(max_tokens=max_tokens, dropout=dropout, init=init)
    together = train(model, jobs, settings)
    in_a_queue = by_name(train(model, jobs[::-1], settings, slots=2))
    for one, job in zip(together, jobs, strict=True):
        (alone,) = train(model, [job], settings)
        assert len(alone.train_losses) == 8
        assert alone.best_step > 0
        assert_equal_training(one, alone, 1e-9)
        assert_equal_training(in_a_queue[job.name], alone, 1e-9)


def test_training_together_equals_training_alone_in_float32(
    tiny_model: Make, jobs: list[Job], loop_settings: Make, train: Make
) -> None:
    model = tiny_model()
    settings = loop_settings(max_tokens=60, dropout=0.1)
    for one, job in zip(train(model, jobs, settings), jobs, strict=True):
        assert_equal_training(one, train(model, [job], settings)[0], 1e-3)


def unlike(jobs: list[Job]) -> list[Job]:
    """Experts of other ranks, alphas, layers, steps and tasks."""
    first, second, third = jobs
    tasks = [i % 3 for i in range(len(second.train))]
    some = frozenset({"model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"})
    return [
        replace(first, rank=1, alpha=2.0, num_steps=11),
        replace(second, rank=3, targets=some, num_steps=5, train_tasks=tasks, val_tasks=[2, 0, 1]),
        replace(third, num_steps=2),
        replace(second, name="weighted", num_steps=7, train_tasks=tasks, task_weights=[1.0, 5.0, 0.5]),
        replace(first, name="late", alpha=1.0, num_steps=3),
    ]


@pytest.mark.parametrize(("slots", "dropout"), [(1, 0.0), (2, 0.2), (3, 0.0)])
def test_unlike_units_pass_through_the_slots_as_if_each_were_alone(
    tiny_model: Make, jobs: list[Job], loop_settings: Make, train: Make, slots: int, dropout: float
) -> None:
    model, settings = tiny_model(dtype=torch.float64), loop_settings(dropout=dropout, max_tokens=100, init="own")
    queue = unlike(jobs)
    units = by_name(train(model, queue, settings, slots=slots))
    for job in queue:
        (alone,) = train(model, [job], settings)
        assert len(alone.train_losses) == job.num_steps
        assert_equal_training(units[job.name], alone, 1e-9)
    assert {f.rank for f in units["long"].adapters["long"].values()} == {3}
    assert len(units["long"].adapters["long"]) == 2
    assert units["late"].adapters["late"]["model.layers.0.mlp.down_proj"].scaling == 0.5


def test_rows_and_columns_beyond_an_experts_rank_stay_exactly_zero(
    tiny_model: Make, jobs: list[Job], loop_settings: Make, some_stack: Make
) -> None:
    model = tiny_model()
    only = frozenset({"model.layers.0.self_attn.v_proj"})
    low = replace(jobs[0], rank=1, targets=only)
    queue = [low, replace(jobs[1], rank=3)]
    stack = some_stack(model, queue, 2)
    train_queue(model, queue, stack, loop_settings(dropout=0.2), on_finish=lambda unit: None)
    for path, module in stack.modules.items():
        rank = 1 if path in only else 0
        for vanishing in (module.lora_a[0, rank:], module.lora_b[0, :, rank:]):
            assert vanishing.count_nonzero() == 0
        assert module.lora_b[1].count_nonzero() == module.lora_b[1].numel()


def test_units_take_the_slots_in_the_order_of_the_queue(
    tiny_model: Make, jobs: list[Job], loop_settings: Make, train: Make
) -> None:
    seen: list[dict[str, int]] = []

    class Watch(Callback):
        def on_step(self, steps: Mapping[str, int], losses: Any, tokens: int, seconds: float) -> None:
            seen.append(dict(steps))
            assert list(losses) == list(steps)

    queue = [replace(job, num_steps=n) for job, n in zip(jobs, (3, 1, 2), strict=True)]
    units = train(tiny_model(), queue, loop_settings(), slots=2, callbacks=[Watch()])
    assert seen == [{"short": 1, "long": 1}, {"short": 2, "few": 1}, {"short": 3, "few": 2}]
    assert [unit.name for unit in units] == ["long", "short", "few"]


def overfitting(job: Job, random_examples: Make, generator: torch.Generator) -> Job:
    """Rows for validation that get better at first, and worse when the training rows are learnt by heart."""
    val = [job.train[0], *random_examples(2, generator)]
    return Job("a", job.train[:2], val, num_steps=16, rank=2, alpha=4.0)


def test_the_best_checkpoint_is_kept_not_the_last(
    tiny_model: Make, jobs: list[Job], random_examples: Make, route: Make, loop_settings: Make, train: Make,
    generator: torch.Generator,
) -> None:  # fmt: skip
    model = tiny_model(dtype=torch.float64)
    job = overfitting(jobs[0], random_examples, generator)
    settings = loop_settings(optimiser=OptimiserSettings(0.3, clip=1.0), num_evals=8)
    (found,) = train(model, [job], settings)
    losses = dict(found.val_losses)
    assert list(losses) == list(range(0, 17, 2))
    assert losses[found.best_step] == min(losses.values())
    assert 0 < found.best_step < 16
    assert not found.stopped_early
    modules = found.adapters["a"]
    config = new_config(None, rank=2, alpha=4.0, target_modules=sorted(modules))
    route(model, [Adapter("a", modules, config)], experts=["a"])
    assert float(target_losses(model, collate(job.val)).mean()) == pytest.approx(min(losses.values()), rel=1e-6)


def test_patience_ends_a_unit_and_its_slot_goes_to_the_next(
    tiny_model: Make, jobs: list[Job], random_examples: Make, loop_settings: Make, train: Make,
    generator: torch.Generator,
) -> None:  # fmt: skip
    model = tiny_model(dtype=torch.float64)
    job = overfitting(jobs[0], random_examples, generator)
    settings = loop_settings(optimiser=OptimiserSettings(0.1, clip=1.0), num_evals=16)
    (patient,) = train(model, [job], settings)
    hasty, following = train(model, [job, replace(jobs[2], num_steps=2)], replace(settings, patience=2), slots=1)
    done = hasty.best_step + 2
    assert hasty.stopped_early
    assert 2 < done < 16
    assert hasty.val_losses == patient.val_losses[: done + 1]
    assert hasty.train_losses == patient.train_losses[:done]
    assert (following.name, len(following.train_losses), following.stopped_early) == ("few", 2, False)


def test_dropout_changes_training_and_nothing_else(
    tiny_model: Make, jobs: list[Job], loop_settings: Make, train: Make
) -> None:
    model = tiny_model(dtype=torch.float64)
    few = [replace(jobs[2], train=jobs[2].train[:1], val=jobs[2].train[:1])]
    # One row for training and validation: without dropout the training loss is the validation loss before the step.
    losses: dict[float, list[float]] = {}
    for dropout in (0.0, 0.5):
        (unit,) = train(model, few, loop_settings(num_evals=8, dropout=dropout, batch_size=1))
        differences = [abs(a - b) for a, (_, b) in zip(unit.train_losses, unit.val_losses[:-1], strict=True)]
        losses[dropout] = differences
        # lora_b is zero at first, so that dropout has nothing to drop.
        assert differences[0] < 1e-9
    assert max(losses[0.0]) < 1e-6
    assert min(losses[0.5][1:]) > 1e-4


def test_the_model_is_bare_and_unchanged_after_training(
    tiny_model: Make, jobs: list[Job], loop_settings: Make, train: Make
) -> None:
    model = tiny_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train(model, jobs, loop_settings(dropout=0.5, activation_checkpointing=True))

    class Stop(Callback):
        def on_step(self, steps: Any, losses: Any, tokens: int, seconds: float) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, jobs, loop_settings(activation_checkpointing=True), callbacks=[Stop()])
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not [m for m in model.modules() if m._forward_hooks or hasattr(m, "lorary") or "forward" in vars(m)]
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_that_is_not_finite_names_expert_and_step(
    tiny_model: Make, jobs: list[Job], loop_settings: Make, train: Make
) -> None:
    model = tiny_model()
    poison = 299
    model.model.embed_tokens.weight = torch.nn.Parameter(model.model.embed_tokens.weight.clone(), requires_grad=False)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    model.model.embed_tokens.weight[poison] = float("nan")

    def clean(job: Job) -> Job:
        def ids(values: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(min(value, poison - 1) for value in values)

        rows = [replace(row, prompt_ids=ids(row.prompt_ids), target_ids=ids(row.target_ids)) for row in job.train]
        return replace(job, train=rows, val=rows[:2])

    queue = [clean(job) for job in jobs]
    row = queue[1].train[0]
    broken = replace(row, prompt_ids=(poison, *row.prompt_ids[1:]))
    queue[1] = replace(queue[1], train=[broken, *queue[1].train[1:]], val=queue[1].train[1:3])
    steps: list[int] = []

    class Count(Callback):
        def on_step(self, done: Any, losses: Any, tokens: int, seconds: float) -> None:
            steps.append(done["long"])

    with pytest.raises(TrainError, match=r"the training loss of expert 'long' must be finite at step (\d)") as error:
        train(model, queue, loop_settings(), callbacks=[Count()])
    assert f"at step {len(steps) + 1}" in error.value.rule
    queue[1] = replace(queue[1], val=[broken])
    with pytest.raises(TrainError, match="the validation loss of expert 'long' must be finite at step 0"):
        train(model, queue, loop_settings())


def test_a_name_that_comes_twice_is_refused(
    tiny_model: Make, jobs: list[Job], loop_settings: Make, train: Make
) -> None:
    with pytest.raises(TrainError, match="expert 'few' must come once in a queue"):
        train(tiny_model(), [*jobs, jobs[2]], loop_settings())


def test_a_base_in_training_mode_is_refused(
    tiny_model: Make, jobs: list[Job], loop_settings: Make, train: Make
) -> None:
    with pytest.raises(UsageError, match="must be in evaluation mode"):
        train(tiny_model().train(), jobs, loop_settings())


def test_a_half_precision_base_trains_float32_experts(
    tiny_model: Make, jobs: list[Job], loop_settings: Make, train: Make
) -> None:
    (unit,) = train(tiny_model(dtype=torch.bfloat16), jobs[:1], loop_settings())
    assert vector(unit).dtype == torch.float32
    assert unit.train_losses[-1] < unit.train_losses[0]


def test_a_frozen_base_is_multiplied_by_reordered_weights_while_it_is_trained_over(
    tiny_model: Make, jobs: list[Job], loop_settings: Make, train: Make
) -> None:
    model = tiny_model()
    if not packed_bytes(model):
        pytest.skip("this machine has no oneDNN for x86")
    layer = model.model.layers[0].mlp.up_proj
    found = []

    class Looks(Callback):
        def on_step(self, *_args: Any) -> None:
            found.append("forward" in vars(layer))

    train(model, jobs[:1], loop_settings(), callbacks=[Looks()])
    assert found == [True] * 8
    assert "forward" not in vars(layer)
