"""Settings of a build: what decides what an expert becomes, and named sets of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lorary.errors import UsageError
from lorary.flags import check_choice, check_flags, flag
from lorary.numbers import MICRO_TOKENS, MOST_COUNT, MOST_SEED, check_count, check_number, is_number, shown

PROPORTIONAL, UNIFORM = "proportional", "uniform"
AUTO = "auto"
# Behind the dtype of a base that computes in bfloat16.
AUTOCAST = " with autocast"
LOGS = ("jsonl", "tensorboard", "wandb", "trackio")
# No machine has memory for more.
_MOST_RANK, _MOST_ROWS = 1 << 16, 1 << 20
# Below it the chances of tasks lie so far apart that only the largest are ever met.
LOWEST_TEMPERATURE = 0.05


def parse_sampling(text: str | None) -> str | float | None:
    """A temperature as a number; a word, known or not, and None stay as they are."""
    try:
        return text if text is None else float(text)
    except ValueError:
        return text  # refused by `BuildSettings`, which knows the words


def parse_max_tokens(text: str) -> str | int:
    """A number of tokens; what is no number stays as it is."""
    try:
        return int(text)
    except ValueError:
        return text  # refused by `RunSettings`, unless it is `auto`


@dataclass(frozen=True)
class BuildSettings:
    """Everything that decides what an expert becomes; recorded in its provenance.

    Args:
        rank: rank of every expert.
        alpha: scaling is alpha / rank.
        target_modules: layers to adapt, by the last part of their path, or `all-linear`.
        upper_layers: adapt only so many of the last transformer layers; all of them by default.
        learning_rate: peak of the schedule.
        steps: optimiser steps per expert.
        epochs: passes over the training rows of an expert, in place of `steps`.
        batch_size: rows per step and expert.
        warmup: share of the steps over which the learning rate rises.
        clip: largest norm of an expert's gradient.
        weight_decay: decoupled weight decay.
        dropout: dropout on the input of the adapters, while training only.
        evals: how often the validation loss is taken.
        seed: seed of initial weights, order of rows and dropout.
        init: initial lora_a: `shared` (one draw per layer for the whole library) or `own` (one per expert).
        init_scale: bound of the initial lora_a, in units of PEFT's 1 / sqrt(d_in).
        template: how rows become prompts: `plain` or `chat`.
        max_length: tokens of a row; longer prompts lose their start.
        train_rows: use the first so many training rows of a task; all by default.
        val_rows: use the first so many validation rows of a task.
        patience: end an expert after so many evaluations without a better validation loss; never by default.
        sampling: how often an expert of several tasks meets each: `proportional` to their rows (their union, each row
            once an epoch), `uniform`, or a temperature T, for chances proportional to rows^(1/T).
    """

    rank: int = flag(4, above=0, most=_MOST_RANK)
    alpha: float = flag(16.0, above=0.0)
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    upper_layers: int | None = flag(None, above=0)
    learning_rate: float = flag(3e-3, above=0.0)
    steps: int | None = flag(60, above=0)
    epochs: float | None = flag(None, above=0.0, most=float(MOST_COUNT))
    batch_size: int = flag(8, above=0, most=_MOST_ROWS)
    warmup: float = flag(0.06, least=0.0, most=1.0, option="")
    clip: float = flag(0.1, above=0.0, option="")
    weight_decay: float = flag(0.0, least=0.0, option="")
    dropout: float = flag(0.0, least=0.0, below=1.0)
    evals: int = flag(4, above=0)
    seed: int = flag(0, least=-MOST_SEED, most=MOST_SEED)
    init: str = flag("shared", choices=("shared", "own"))
    init_scale: float = flag(1.0, least=0.0, option="")
    template: str = "plain"
    max_length: int = flag(1024, above=0)
    train_rows: int | None = flag(None, above=0)
    val_rows: int = flag(32, above=0)
    patience: int | None = flag(None, above=0)
    sampling: str | float = flag(PROPORTIONAL, parse=parse_sampling)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise UsageError(
                "a build needs either --steps or --epochs", found=f"steps {self.steps}, epochs {self.epochs}"
            )
        check_flags(self)
        is_word = isinstance(self.sampling, str) and self.sampling in (PROPORTIONAL, UNIFORM)
        if not is_word and not (is_number(self.sampling) and float(self.sampling) >= LOWEST_TEMPERATURE):
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
        window: experts or tasks trained at a time; the others wait for a place.
        max_tokens: padded tokens of one micro-batch; `auto` measures how many fit the device's memory.
        device: where the base runs: `auto`, `cpu`, `cuda`, `mps`, ...
        dtype: precision of the base: `auto`, `float32`, `bfloat16`, ...
        activation_checkpointing: compute activations twice, to save memory.
        autocast: multiply by the base's weights in bfloat16 while training, whatever `dtype` they are kept in.
        logs: what is written while training: `jsonl`, `tensorboard`, `wandb` or `trackio`; may be repeated.
        save_every_s: seconds between checkpoints.
    """

    window: int = flag(16, least=1)
    max_tokens: int | str = flag(MICRO_TOKENS, parse=parse_max_tokens, metavar="N|auto")
    device: str = "auto"
    dtype: str = "auto"
    activation_checkpointing: bool = False
    autocast: bool = False
    logs: tuple[str, ...] = flag(("jsonl",), option="--log", metavar="KIND", is_repeated=True)
    save_every_s: float = flag(15.0, option="--save-every")

    def __post_init__(self) -> None:
        object.__setattr__(self, "logs", tuple(dict.fromkeys(self.logs)))
        check_flags(self)
        if self.max_tokens != AUTO:
            check_count("--max-tokens", self.max_tokens, remedy="a number, or auto")
        if self.save_every_s != math.inf:  # which is never
            check_number("--save-every", self.save_every_s, above=0.0)
        for kind in self.logs:
            check_choice("--log", kind, LOGS)

    @property
    def precision(self) -> str:
        """What is asked for: the dtype of the base, and whether it computes in a narrower one."""
        return f"{self.dtype}{AUTOCAST if self.autocast else ''}"

    def precision_of(self, model: Any) -> str:
        """The same of a base in memory, as provenances record it.

        Args:
            model: the base.
        """
        return f"{model.dtype}{AUTOCAST if self.autocast else ''}"

    @property
    def fixed_tokens(self) -> int:
        """Tokens of a batch where nothing is trained, and so nothing measured."""
        return MICRO_TOKENS if isinstance(self.max_tokens, str) else self.max_tokens


@dataclass(frozen=True)
class BuildSource:
    """What a build is made from, and by how many.

    Args:
        base: base model of a new library: `embedded`, a transformers folder, a .gguf file or a Hub id.
        names: only these tasks, by name, separated by commas.
        columns: columns of your own data that hold prompt and answer, such as source=question,target=reply.
        held_out: tasks to keep apart from those that are trained on.
        overlap: `report` what overlaps them, or `drop` the tasks that do.
        workers: processes that train: by default this one alone, or one for each GPU of a Ray cluster.
    """

    base: str = "embedded"
    names: tuple[str, ...] | None = flag(None, option="--tasks")
    columns: str | None = flag(None, metavar="FIELD=COLUMN,...")
    held_out: str | None = flag(None, metavar="TASKS")
    overlap: str = "report"
    workers: int | None = None


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
    check_choice("a preset", name, tuple(PRESETS))
    overrides = {key: value for key, value in changes.items() if value is not None}
    if "steps" in overrides and "epochs" in overrides:
        raise UsageError(
            "--steps and --epochs must not be given together", found=f"{overrides['steps']}, {overrides['epochs']}"
        )
    fields = {**PRESETS[name], **overrides}
    if "epochs" in overrides:
        fields["steps"] = None
    elif "steps" in overrides:
        fields["epochs"] = None
    return replace(BuildSettings(), **fields)
