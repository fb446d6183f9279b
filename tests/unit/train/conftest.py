"""A window of three experts whose rows differ in length and number, and settings that train it in a second."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lorary.lora.targets import find_targets
from lorary.train.loop import ExpertData, LoopSettings
from lorary.train.optimiser import OptimiserSettings

SETTINGS = LoopSettings(
    OptimiserSettings(learning_rate=0.02, num_steps=8, clip=0.3, weight_decay=0.01),
    batch_size=3,
    rank=2,
    alpha=4.0,
    num_evals=2,
    max_tokens=10_000,
    save_every_s=0.0,
)


@pytest.fixture
def loop_settings() -> Callable[..., LoopSettings]:
    """Settings of eight steps, with changes; `num_steps` goes to the optimiser."""

    def make(num_steps: int | None = None, **changes: Any) -> LoopSettings:
        settings = replace(SETTINGS, **changes)
        return (
            settings
            if num_steps is None
            else replace(settings, optimiser=replace(settings.optimiser, num_steps=num_steps))
        )

    return make


@pytest.fixture
def window(random_examples: Callable[..., Any], generator: torch.Generator) -> list[ExpertData]:
    """Three experts: short rows, long rows, and few rows."""

    def expert(name: str, rows: int, longest: int) -> ExpertData:
        train = random_examples(rows, generator, longest)
        return ExpertData(name, train, train[:3])

    return [expert("short", 10, 7), expert("long", 9, 20), expert("few", 2, 12)]


@pytest.fixture
def some_targets() -> Callable[[Any], dict[str, tuple[int, int]]]:
    """Layers of an attention and of an MLP, in both layers of the model; few, for speed."""
    return lambda model: find_targets(model, ["v_proj", "down_proj"])
