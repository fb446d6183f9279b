"""Settings of a build: what decides what an expert becomes, and named sets of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lorary.errors import UsageError


@dataclass(frozen=True)
class BuildSettings:
    """Everything that decides what an expert becomes; recorded in its provenance.

    Args:
        rank: rank of every expert.
        alpha: scaling is alpha / rank.
        target_modules: last parts of the paths of the layers to adapt, or `all-linear`.
        upper_layers: adapt that many of the last transformer layers only; all of them where None.
        learning_rate: peak of the schedule.
        steps: optimiser steps; None takes `epochs` instead.
        epochs: passes over the training rows, where `steps` is None.
        batch_size: rows per step.
        warmup: share of the steps over which the learning rate rises.
        clip: largest norm of an expert's gradient.
        weight_decay: decoupled weight decay.
        dropout: on the input of the adapters, while training only.
        evals: how often the validation loss is taken.
        seed: of initial weights, order of rows and dropout.
        init: `shared` (one draw of lora_a per layer for the whole library) or `own` (one per expert).
        init_scale: bound of the initial lora_a, in units of PEFT's 1 / sqrt(d_in).
        template: `plain` or `chat`.
        max_length: tokens of a row; longer prompts are cut on the left.
        train_rows: use the first so many training rows of a task; all where None.
        val_rows: use the first so many validation rows.
    """

    rank: int = 4
    alpha: float = 16.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    upper_layers: int | None = None
    learning_rate: float = 3e-3
    steps: int | None = 60
    epochs: float | None = None
    batch_size: int = 8
    warmup: float = 0.06
    clip: float = 0.1
    weight_decay: float = 0.0
    dropout: float = 0.0
    evals: int = 4
    seed: int = 0
    init: str = "shared"
    init_scale: float = 1.0
    template: str = "plain"
    max_length: int = 1024
    train_rows: int | None = None
    val_rows: int = 32

    def __post_init__(self) -> None:
        positive = ("rank", "batch_size", "evals", "val_rows", "max_length", "learning_rate", "alpha", "clip")
        for key in positive:
            if not 0 < getattr(self, key) < math.inf:
                raise UsageError(f"--{key.replace('_', '-')} must be above 0", found=getattr(self, key))
        if (self.steps is None) == (self.epochs is None):
            raise UsageError(
                "a build needs either --steps or --epochs", found=f"steps {self.steps}, epochs {self.epochs}"
            )
        for key in ("steps", "epochs", "train_rows", "upper_layers"):
            if getattr(self, key) is not None and not 0 < getattr(self, key) < math.inf:
                raise UsageError(f"--{key.replace('_', '-')} must be above 0", found=getattr(self, key))
        if not 0 <= self.dropout < 1:
            raise UsageError("--dropout must be at least 0 and below 1", found=self.dropout)
        if self.init not in ("shared", "own"):
            raise UsageError("--init must be shared or own", found=self.init)

    def num_steps(self, num_rows: int) -> int:
        """Optimiser steps for a task of so many training rows."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, math.ceil(self.epochs * num_rows / self.batch_size))


# The recipe of the paper (arXiv 2405.11157) and its code at the time: alpha was not set and so 1; the best of five
# epochs is kept; initial weights are smaller than PEFT's.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "paper-2024": {
        "alpha": 1.0,
        "learning_rate": 1e-4,
        "steps": None,
        "epochs": 5.0,
        "batch_size": 16,
        "dropout": 0.05,
        "evals": 5,
        "init_scale": 3**-0.5,
        "max_length": 2048,
        "val_rows": 1000,
    },
}


def preset(name: str, **changes: Any) -> BuildSettings:
    """The settings of a preset with changes; a change of None keeps the preset's value.

    Args:
        name: a key of `PRESETS`.
        changes: fields of `BuildSettings`.

    Returns:
        The settings.

    Raises:
        UsageError: if there is no such preset, or a value is out of range.
    """
    if name not in PRESETS:
        raise UsageError("a preset must exist", found=name, remedy=f"one of {list(PRESETS)}")
    given = {key: value for key, value in changes.items() if value is not None}
    if "steps" in given and "epochs" in given:
        raise UsageError(
            "--steps and --epochs must not be given together", found=f"{given['steps']}, {given['epochs']}"
        )
    fields = {**PRESETS[name], **given}
    if "epochs" in given:
        fields["steps"] = None
    elif "steps" in given:
        fields["epochs"] = None
    return replace(BuildSettings(), **fields)
