"""Three experts whose rows differ in length and number, settings that train them in a second, and a queue to do it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from lorary.lora.targets import find_targets
from lorary.train.callbacks import Callback
from lorary.train.loop import train_queue
from lorary.train.optimiser import OptimiserSettings
from lorary.train.stack import expert_stack
from lorary.train.units import Job, LoopSettings, TrainedUnit

SETTINGS = LoopSettings(
    OptimiserSettings(learning_rate=0.02, clip=0.3, weight_decay=0.01),
    batch_size=3,
    num_evals=2,
    max_tokens=10_000,
    save_every_s=0.0,
)


@pytest.fixture
def loop_settings() -> Callable[..., LoopSettings]:
    """The settings with changes."""
    return lambda **changes: replace(SETTINGS, **changes)


@pytest.fixture
def jobs(random_examples: Callable[..., Any], generator: torch.Generator) -> list[Job]:
    """Three experts of eight steps: short rows, long rows, and few rows."""

    def job(name: str, rows: int, longest: int) -> Job:
        train = random_examples(rows, generator, longest)
        return Job(name, train, train[:3], num_steps=8, rank=2, alpha=4.0)

    return [job("short", 10, 7), job("long", 9, 20), job("few", 2, 12)]


@pytest.fixture
def some_stack() -> Callable[..., Any]:
    """A stack over few layers, for speed: `some_stack(model, jobs, num_slots)`.

    They are of an attention and of an MLP, in both layers of the model.
    """
    return lambda model, *args: expert_stack(model, find_targets(model, ["v_proj", "down_proj"]), *args)


@pytest.fixture
def train(some_stack: Callable[..., Any]) -> Callable[..., list[TrainedUnit]]:
    """Train a queue: `train(model, jobs, settings, slots=2, checkpoint=path)` -> units in the order they finished."""

    def run(
        model: Any,
        jobs: Sequence[Job],
        settings: LoopSettings,
        *,
        slots: int | None = None,
        callbacks: Sequence[Callback] = (),
        **options: Any,
    ) -> list[TrainedUnit]:
        units: list[TrainedUnit] = []
        stack = some_stack(model, jobs, slots or len(jobs))
        train_queue(model, jobs, stack, settings, on_finish=units.append, callbacks=callbacks, **options)
        return units

    return run
