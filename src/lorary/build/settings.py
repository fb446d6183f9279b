"""Settings of a build: what decides what an expert becomes, and named sets of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lorary.errors import UsageError
from lorary.numbers import MOST, MOST_COUNT, MOST_SEED, check_count, check_number, is_number, shown

PROPORTIONAL, UNIFORM = "proportional", "uniform"
LOGS = ("jsonl", "tensorboard", "wandb", "trackio")
# More of these are no machine's, and would fail as memory that cannot be had.
_MOST = {"rank": 1 << 16, "batch_size": 1 << 20}
# Below it the chances of tasks lie so far apart that only the largest are ever met.
LOWEST_TEMPERATURE = 0.05


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
        val_rows: use the first so many validation rows of a task.
        patience: stop an expert after so many evaluations without a better validation loss; never where None.
        sampling: how often an expert of several tasks meets each: `proportional` to their rows (their union, each row
            once an epoch), `uniform`, or a temperature T, for chances proportional to rows^(1/T).
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
    patience: int | None = None
    sampling: str | float = PROPORTIONAL

    def __post_init__(self) -> None:
        for key in ("rank", "batch_size", "evals", "val_rows", "max_length"):
            check_count(option(key), getattr(self, key), above=0, most=_MOST.get(key, MOST_COUNT))
        for key in ("learning_rate", "alpha", "clip"):
            check_number(option(key), getattr(self, key), above=0.0)
        if (self.steps is None) == (self.epochs is None):
            raise UsageError(
                "a build needs either --steps or --epochs", found=f"steps {self.steps}, epochs {self.epochs}"
            )
        for key in ("steps", "train_rows", "upper_layers", "patience"):
            if getattr(self, key) is not None:
                check_count(option(key), getattr(self, key), above=0)
        if self.epochs is not None:
            check_number("--epochs", self.epochs, above=0.0, most=float(MOST_COUNT))
        for key, most in (("warmup", 1.0), ("weight_decay", MOST), ("init_scale", MOST)):
            check_number(key, getattr(self, key), least=0.0, most=most)
        check_number("--dropout", self.dropout, least=0.0, below=1.0)
        check_count("--seed", self.seed, least=-MOST_SEED, most=MOST_SEED)
        if self.init not in ("shared", "own"):
            raise UsageError("--init must be shared or own", found=self.init)
        self._check_sampling()

    def _check_sampling(self) -> None:
        words = isinstance(self.sampling, str) and self.sampling in (PROPORTIONAL, UNIFORM)
        if not words and not (is_number(self.sampling) and float(self.sampling) >= LOWEST_TEMPERATURE):
            raise UsageError(
                f"--sampling must be {PROPORTIONAL}, {UNIFORM} or a temperature of at least {LOWEST_TEMPERATURE}",
                found=shown(self.sampling),
            )

    def task_weights(self, num_rows: Sequence[int]) -> tuple[float, ...]:
        """Sampling weights of an expert's tasks; empty where rows are taken as their union has them.

        Args:
            num_rows: training rows of each task.
        """
        if self.sampling == PROPORTIONAL or len(num_rows) == 1:
            return ()
        power = 0.0 if self.sampling == UNIFORM else 1.0 / float(self.sampling)
        # Of shares, since powers of the numbers themselves could pass what a float holds.
        weights = [(number / max(num_rows)) ** power for number in num_rows]
        return tuple(weight / sum(weights) for weight in weights)

    def num_steps(self, num_rows: int) -> int:
        """Optimiser steps for an expert of so many training rows, over all its tasks."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, math.ceil(self.epochs * num_rows / self.batch_size))


@dataclass(frozen=True)
class RunSettings:
    """How a build is run: speed, memory and what is watched, but not what an expert becomes (rounding aside).

    Args:
        window: experts trained at a time; the others wait for a place.
        max_tokens: padded tokens of one micro-batch.
        device: where the base runs, as `lorary.model.base.choose_device` takes it.
        dtype: of the base, as `lorary.model.base.choose_dtype` takes it.
        activation_checkpointing: compute activations twice rather than keep them.
        logs: what is written while training: `jsonl`, `tensorboard`, `wandb`, `trackio`.
        save_every_s: seconds between checkpoints.
    """

    window: int = 16
    max_tokens: int = 1024
    device: str = "auto"
    dtype: str = "auto"
    activation_checkpointing: bool = False
    logs: tuple[str, ...] = ("jsonl",)
    save_every_s: float = 15.0

    def __post_init__(self) -> None:
        for key in ("window", "max_tokens"):
            check_count(option(key), getattr(self, key))
        if self.save_every_s != math.inf:  # which is never
            check_number("--save-every", self.save_every_s, above=0.0)
        if unknown := [kind for kind in self.logs if kind not in LOGS]:
            raise UsageError(f"--log must be one of {', '.join(LOGS)}", found=unknown[0])


def option(field: str) -> str:
    """The option of the command line that sets a field."""
    return f"--{field.replace('_', '-')}"


def parse_sampling(text: str | None) -> str | float | None:
    """A word as it is, a temperature as a number; None stays None."""
    if text is None or text in (PROPORTIONAL, UNIFORM):
        return text
    try:
        return float(text)
    except ValueError:
        return text  # refused by `BuildSettings`, which knows the words


def recorded_settings(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a provenance records them, completed: keys that are newer than it had their defaults then."""
    return {**as_recorded(BuildSettings()), **recorded}


def as_recorded(settings: BuildSettings) -> dict[str, Any]:
    """Settings as values of JSON."""
    values = asdict(settings)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


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
