"""One expert's AdamW, clipping and schedule are torch's own; many experts' are many of those."""

import math

import pytest
import torch
from torch import Tensor

from lorary.train.optimiser import ExpertwiseAdamW, OptimiserSettings

SETTINGS = OptimiserSettings(0.01, num_steps=12, warmup=0.25, clip=0.5, weight_decay=0.1)


def gradients(generator: torch.Generator, size: int) -> list[Tensor]:
    """Twelve gradients; some are below the clipping norm."""
    scales = torch.logspace(-3, 1, 12, dtype=torch.float64)
    return [scale * torch.randn(size, generator=generator, dtype=torch.float64) for scale in scales]


def by_torch(start: Tensor, grads: list[Tensor], settings: OptimiserSettings) -> Tensor:
    parameter = torch.nn.Parameter(start.clone())
    optimiser = torch.optim.AdamW(
        [parameter], lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), eps=settings.eps,
        weight_decay=settings.weight_decay,
    )  # fmt: skip
    warm = math.ceil(settings.warmup * settings.num_steps)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return (settings.num_steps - step) / max(1, settings.num_steps - warm)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    for gradient in grads:
        parameter.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_([parameter], settings.clip)
        optimiser.step()
        schedule.step()
    return parameter.detach()


@pytest.mark.parametrize("warmup", [0.0, 0.06, 0.25, 1.0])
def test_one_expert_is_stepped_as_torch_would(generator: torch.Generator, warmup: float) -> None:
    settings = OptimiserSettings(0.01, num_steps=12, warmup=warmup, clip=0.5, weight_decay=0.1)
    start, grads = torch.randn(20, generator=generator, dtype=torch.float64), gradients(generator, 20)
    parameters = start.clone()
    optimiser = ExpertwiseAdamW(parameters, settings)
    for step, gradient in enumerate(grads):
        own = gradient.clone()
        norms = optimiser.step(own, [own[:8].view(1, 8), own[8:].view(1, 12)], step)
        assert norms.item() == pytest.approx(float(gradient.norm()))
    expected = by_torch(start, grads, settings)
    assert (parameters - expected).norm() / expected.norm() < 1e-12


def test_each_of_many_experts_is_clipped_by_its_own_norm(generator: torch.Generator) -> None:
    # Two blocks of three experts, 4 and 6 numbers each; the gradients of the experts differ by orders of magnitude.
    starts = [torch.randn(10, generator=generator, dtype=torch.float64) for _ in range(3)]
    grads = [[scale * g for g in gradients(generator, 10)] for scale in (0.01, 1.0, 100.0)]

    def lay_out(vectors: list[Tensor]) -> Tensor:
        return torch.cat([*(v[:4] for v in vectors), *(v[4:] for v in vectors)])

    parameters = lay_out(starts)
    optimiser = ExpertwiseAdamW(parameters, SETTINGS)
    for step in range(12):
        own = lay_out([expert[step] for expert in grads])
        optimiser.step(own, [own[:12].view(3, 4), own[12:].view(3, 6)], step)
    expected = lay_out([by_torch(s, g, SETTINGS) for s, g in zip(starts, grads, strict=True)])
    assert (parameters - expected).norm() / expected.norm() < 1e-12


def test_the_schedule_rises_over_the_warm_up_and_falls_to_zero_after_the_last_step() -> None:
    settings = OptimiserSettings(1.0, num_steps=10, warmup=0.15)
    rates = [settings.rate_at(step) for step in range(11)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0])
