"""Training: together equals alone, killed and resumed equals undisturbed, and a broken loss is named."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.adapter import Adapter
from lorary.data.batching import collate
from lorary.errors import TrainError, UsageError
from lorary.formats.peft import new_config
from lorary.model.logits import target_losses
from lorary.train.loop import ExpertData, Hooks, TrainedExpert, train_window
from lorary.train.optimiser import OptimiserSettings

Make = Callable[..., Any]


def vector(expert: TrainedExpert) -> Tensor:
    return torch.cat([t.flatten() for f in expert.modules.values() for t in (f.lora_a, f.lora_b)])


def have_same_bits(first: Sequence[TrainedExpert], second: Sequence[TrainedExpert]) -> bool:
    return all(
        torch.equal(vector(one), vector(other))
        and (one.name, one.train_losses, one.val_losses, one.best_step)
        == (other.name, other.train_losses, other.val_losses, other.best_step)
        for one, other in zip(first, second, strict=True)
    )


def assert_equal_training(one: TrainedExpert, other: TrainedExpert, tolerance: float) -> None:
    assert one.name == other.name
    assert len(one.train_losses) == 8
    assert one.train_losses == pytest.approx(other.train_losses, rel=tolerance)
    assert [loss for _, loss in one.val_losses] == pytest.approx([v for _, v in other.val_losses], rel=tolerance)
    assert one.best_step == other.best_step > 0
    assert (vector(one) - vector(other)).norm() < tolerance * vector(other).norm()


@pytest.mark.parametrize(
    ("max_tokens", "dropout", "init"),
    [(10_000, 0.0, "shared"), (10_000, 0.3, "own"), (70, 0.3, "own"), (45, 0.3, "shared"), (1, 0.3, "own")],
)
def test_training_together_equals_training_alone(
    tiny_model: Make, window: list[ExpertData], loop_settings: Make, some_targets: Make,
    max_tokens: int, dropout: float, init: str,
) -> None:  # fmt: skip
    # The budgets: one micro-batch for all; some experts share one; most split their rows; one row at a time.
    model = tiny_model(dtype=torch.float64)
    targets = some_targets(model)
    settings = loop_settings(max_tokens=max_tokens, dropout=dropout, init=init)
    together = train_window(model, window, targets, settings)
    alone = [train_window(model, [expert], targets, settings)[0] for expert in window]
    in_two = [
        *train_window(model, window[1:][::-1], targets, settings),
        *train_window(model, window[:1], targets, settings),
    ]
    for one, other in zip(together, alone, strict=True):
        assert_equal_training(one, other, 1e-9)
    for split in in_two:
        assert_equal_training(split, next(e for e in alone if e.name == split.name), 1e-9)


def test_training_together_equals_training_alone_in_float32(
    tiny_model: Make, window: list[ExpertData], loop_settings: Make, some_targets: Make
) -> None:
    model = tiny_model()
    targets, settings = some_targets(model), loop_settings(max_tokens=60, dropout=0.1)
    together = train_window(model, window, targets, settings)
    for expert, data in zip(together, window, strict=True):
        assert_equal_training(expert, train_window(model, [data], targets, settings)[0], 1e-3)


def test_dropout_changes_training_and_nothing_else(
    tiny_model: Make, window: list[ExpertData], loop_settings: Make, some_targets: Make
) -> None:
    model = tiny_model(dtype=torch.float64)
    targets, few = some_targets(model), [replace(window[2], train=window[2].train[:1], val=window[2].train[:1])]
    # One row for training and validation: without dropout the training loss is the validation loss before the step.
    losses: dict[float, list[float]] = {}
    for dropout in (0.0, 0.5):
        (expert,) = train_window(model, few, targets, loop_settings(num_evals=8, dropout=dropout, batch_size=1))
        differences = [abs(a - b) for a, (_, b) in zip(expert.train_losses, expert.val_losses[:-1], strict=True)]
        losses[dropout] = differences
        # lora_b is zero at first, so that dropout has nothing to drop.
        assert differences[0] < 1e-9
    assert max(losses[0.0]) < 1e-6
    assert min(losses[0.5][1:]) > 1e-4


def test_the_model_is_bare_and_unchanged_after_training(
    tiny_model: Make, window: list[ExpertData], loop_settings: Make, some_targets: Make
) -> None:
    model = tiny_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train_window(model, window, some_targets(model), loop_settings(num_steps=1, num_evals=1, dropout=0.5))

    def stop(step: int, losses: dict[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_window(model, window, some_targets(model), loop_settings(), hooks=Hooks(on_step=stop))
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not [m for m in model.modules() if m._forward_hooks or hasattr(m, "lorary")]
    assert all(p.grad is None for p in model.parameters())


def test_the_best_checkpoint_is_kept_not_the_last(
    tiny_model: Make, window: list[ExpertData], random_examples: Make, route: Make, loop_settings: Make,
    some_targets: Make, generator: torch.Generator,
) -> None:  # fmt: skip
    model = tiny_model(dtype=torch.float64)
    # Other rows for validation, and long steps: learning the training rows by heart makes these worse in the end.
    expert = ExpertData("a", window[0].train[:2], random_examples(4, generator))
    optimiser = OptimiserSettings(0.3, num_steps=16, clip=1.0)
    targets = some_targets(model)
    (found,) = train_window(model, [expert], targets, loop_settings(optimiser=optimiser, num_evals=8))
    losses = dict(found.val_losses)
    assert list(losses) == list(range(0, 17, 2))
    assert losses[found.best_step] == min(losses.values())
    assert 0 < found.best_step < 16
    config = new_config(None, rank=2, alpha=4.0, target_modules=sorted(targets))
    route(model, [Adapter("a", found.modules, config)], experts=["a"])
    assert float(target_losses(model, collate(expert.val)).mean()) == pytest.approx(min(losses.values()), rel=1e-6)


@pytest.mark.parametrize("killed_at", range(1, 9))
def test_a_run_killed_after_any_step_resumes_to_the_same_bits(
    tiny_model: Make, window: list[ExpertData], loop_settings: Make, some_targets: Make, tmp_path: Path, killed_at: int
) -> None:
    model = tiny_model()
    targets, settings = some_targets(model), loop_settings(dropout=0.2, max_tokens=60)
    undisturbed = train_window(model, window, targets, settings)
    steps: list[int] = []

    def die(step: int, losses: dict[str, float]) -> None:
        steps.append(step)
        if step == killed_at:
            raise KeyboardInterrupt

    checkpoint = tmp_path / "build" / "window.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_window(model, window, targets, settings, checkpoint, Hooks(on_step=die))
    steps.clear()
    resumed = train_window(
        model, window, targets, settings, checkpoint, Hooks(on_step=lambda step, _: steps.append(step))
    )
    assert have_same_bits(resumed, undisturbed)
    # A checkpoint is written after each step; the one that was killed before its checkpoint is done again.
    assert steps[0] == killed_at
    steps.clear()
    finished = train_window(
        model, window, targets, settings, checkpoint, Hooks(on_step=lambda step, _: steps.append(step))
    )
    assert steps == []
    assert have_same_bits(finished, undisturbed)


def test_a_loss_that_is_not_finite_names_expert_and_step(
    tiny_model: Make, window: list[ExpertData], loop_settings: Make, some_targets: Make
) -> None:
    model = tiny_model()
    poison = 299
    model.model.embed_tokens.weight = torch.nn.Parameter(model.model.embed_tokens.weight.clone(), requires_grad=False)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    model.model.embed_tokens.weight[poison] = float("nan")

    def clean(expert: ExpertData) -> ExpertData:
        def ids(values: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(min(value, poison - 1) for value in values)

        rows = [replace(row, prompt_ids=ids(row.prompt_ids), target_ids=ids(row.target_ids)) for row in expert.train]
        return replace(expert, train=rows, val=rows[:2])

    experts = [clean(expert) for expert in window]
    row = experts[1].train[0]
    broken = replace(row, prompt_ids=(poison, *row.prompt_ids[1:]))
    experts[1] = replace(experts[1], train=[broken, *experts[1].train[1:]], val=experts[1].train[1:3])
    losses: list[int] = []
    with pytest.raises(TrainError, match=r"the training loss of expert 'long' must be finite at step (\d)") as error:
        train_window(
            model,
            experts,
            some_targets(model),
            loop_settings(),
            hooks=Hooks(on_step=lambda step, _: losses.append(step)),
        )
    assert f"at step {len(losses) + 1}" in error.value.rule
    experts[1] = replace(experts[1], val=[broken])
    with pytest.raises(TrainError, match="the validation loss of expert 'long' must be finite at step 0"):
        train_window(model, experts, some_targets(model), loop_settings())


def test_an_expert_without_rows_is_refused_by_name(
    tiny_model: Make, window: list[ExpertData], loop_settings: Make, some_targets: Make
) -> None:
    model = tiny_model()
    with pytest.raises(TrainError, match=r"expert 'few' needs at least one row .*\nfound: 2 and 0"):
        train_window(model, [window[0], replace(window[2], val=[])], some_targets(model), loop_settings())


def test_a_base_in_training_mode_is_refused(
    tiny_model: Make, window: list[ExpertData], loop_settings: Make, some_targets: Make
) -> None:
    model = tiny_model().train()
    with pytest.raises(UsageError, match="must be in evaluation mode"):
        train_window(model, window, some_targets(model), loop_settings())


def test_a_half_precision_base_trains_float32_experts(
    tiny_model: Make, window: list[ExpertData], loop_settings: Make, some_targets: Make
) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    (expert,) = train_window(model, window[:1], some_targets(model), loop_settings())
    assert vector(expert).dtype == torch.float32
    assert expert.train_losses[-1] < expert.train_losses[0]
