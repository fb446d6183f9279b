"""One slot's AdamW, clipping and schedule are torch's own; many slots are many of those, each at its own step."""

import math

import pytest
import torch
from torch import Tensor

from lorary.train.optimiser import OptimiserSettings, SlotwiseAdamW

SETTINGS = OptimiserSettings(0.01, warmup=0.25, clip=0.5, weight_decay=0.1)


def gradients(generator: torch.Generator, size: int) -> list[Tensor]:
    """Twelve gradients; some are below the clipping norm."""
    scales = torch.logspace(-3, 1, 12, dtype=torch.float64)
    return [scale * torch.randn(size, generator=generator, dtype=torch.float64) for scale in scales]


def by_torch(start: Tensor, grads: list[Tensor], settings: OptimiserSettings, logits: int = 0) -> Tensor:
    """The last `logits` numbers learn ten times as fast and are not decayed."""
    parameters = [torch.nn.Parameter(part.clone()) for part in start.tensor_split([len(start) - logits])]
    rates = (settings.learning_rate, 10 * settings.learning_rate)
    groups = [
        {"params": [parameters[0]], "lr": rates[0], "weight_decay": settings.weight_decay},
        {"params": [parameters[1]], "lr": rates[1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.eps)
    warm = math.ceil(settings.warmup * len(grads))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return (len(grads) - step) / max(1, len(grads) - warm)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    for gradient in grads:
        for parameter, part in zip(parameters, gradient.tensor_split([len(start) - logits]), strict=True):
            parameter.grad = part.clone()
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimiser.step()
        schedule.step()
    return torch.cat([parameter.detach() for parameter in parameters])


@pytest.mark.parametrize("warmup", [0.0, 0.06, 0.25, 1.0])
def test_one_slot_is_stepped_as_torch_would(generator: torch.Generator, warmup: float) -> None:
    settings = OptimiserSettings(0.01, warmup=warmup, clip=0.5, weight_decay=0.1)
    start, grads = torch.randn(20, generator=generator, dtype=torch.float64), gradients(generator, 20)
    parameters, own = start.clone(), torch.zeros(20, dtype=torch.float64)
    optimiser = SlotwiseAdamW(parameters, own, 1, settings)
    for step, gradient in enumerate(grads):
        own.copy_(gradient)
        assert float(optimiser.step(0, step, 12)) == pytest.approx(float(gradient.norm()))
    expected = by_torch(start, grads, settings)
    assert (parameters - expected).norm() / expected.norm() < 1e-12


def test_a_block_with_its_own_rate_is_not_decayed_and_shares_the_norm(generator: torch.Generator) -> None:
    start, grads = torch.randn(20, generator=generator, dtype=torch.float64), gradients(generator, 20)
    parameters, own = start.clone(), torch.zeros(20, dtype=torch.float64)
    optimiser = SlotwiseAdamW(parameters, own, 1, SETTINGS, [(9, None), (4, None), (7, 10.0)])
    for step, gradient in enumerate(grads):
        own.copy_(gradient)
        optimiser.step(0, step, 12)
    expected = by_torch(start, grads, SETTINGS, logits=7)
    assert (parameters - expected).norm() / expected.norm() < 1e-12


def test_slots_at_different_steps_do_not_meet(generator: torch.Generator) -> None:
    # Three units of 12, 8 and 4 steps; the gradients differ by orders of magnitude; the last slot is used twice.
    starts = [torch.randn(10, generator=generator, dtype=torch.float64) for _ in range(4)]
    lengths = (12, 8, 4, 6)
    grads = [
        [scale * g for g in gradients(generator, 10)[:n]]
        for scale, n in zip((0.01, 1.0, 100.0, 3.0), lengths, strict=True)
    ]
    parameters, own = torch.cat(starts[:3]), torch.zeros(30, dtype=torch.float64)
    optimiser = SlotwiseAdamW(parameters, own, 3, SETTINGS)
    seats = [(0, 0, 0), (1, 0, 1), (2, 0, 2), (2, 4, 3)]  # slot, first step of the run, unit
    done = {}
    for now in range(12):
        for slot, first, unit in seats:
            step, mine = now - first, parameters.view(3, 10)[slot]
            if not 0 <= step < lengths[unit]:
                continue
            if unit == 3 and step == 0:
                mine.copy_(starts[3])
                optimiser.reset(slot)
            own.view(3, 10)[slot] = grads[unit][step]
            optimiser.step(slot, step, lengths[unit])
            done[unit] = mine.clone()
    # Free slots stayed as they were.
    assert torch.equal(parameters, torch.cat([done[0], done[1], done[3]]))
    for unit, found in done.items():
        expected = by_torch(starts[unit], grads[unit], SETTINGS)
        assert (found - expected).norm() / expected.norm() < 1e-12


def test_the_schedule_rises_over_the_warm_up_and_falls_to_zero_after_the_last_step() -> None:
    settings = OptimiserSettings(1.0, warmup=0.15)
    rates = [settings.rate_at(step, 10) for step in range(11)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0])
