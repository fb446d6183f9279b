"""The peer of the training benchmark: PEFT and transformers' Trainer, one adapter after the other over one base.

Used as its documentation shows it, with every cost left out that a short benchmark would exaggerate: the base is
loaded once for all adapters, rows are tokenised beforehand, nothing is logged, saved or evaluated while it trains,
and the set-up of each adapter and the first step after it are not counted.
"""

import copy
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from train_rows import TaskRows
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from lorary.adapter import LoraFactors
from lorary.data.template import Example

IGNORED = -100  # label that transformers' loss leaves out


@dataclass(frozen=True)
class Recipe:
    """How one adapter is trained; the same on both sides.

    Args:
        batch_size: rows per step.
        rank: of every layer.
        alpha: scaling is alpha / rank.
        learning_rate: falls linearly to zero after the last step; no warm-up.
        clip: largest norm of the gradient.
        seed: of rows and initial weights.
    """

    batch_size: int = 8
    rank: int = 4
    alpha: float = 16.0
    learning_rate: float = 3e-3
    clip: float = 0.1
    seed: int = 0


@dataclass
class Work:
    """What was done in how many seconds: steps of the optimiser, rows, and tokens of those rows without padding."""

    seconds: float = 0.0
    rows: int = 0
    tokens: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.seconds + other.seconds, self.rows + other.rows, self.tokens + other.tokens)


@dataclass
class Run:
    """What one adapter's training gave.

    Args:
        work: of all steps but the first.
        losses: training loss of each step, nats per target token.
        val_loss: after the last step; None where it was not asked for.
    """

    work: Work = field(default_factory=Work)
    losses: list[float] = field(default_factory=list)
    val_loss: float | None = None


def twin(model: Any) -> Any:
    """A second module tree over the same weights, so that two trainers take turns without undoing each other."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def train_adapter(
    model: Any,
    task: TaskRows,
    leaves: Sequence[str],
    recipe: Recipe,
    num_steps: int,
    *,
    batches: Sequence[Sequence[int]] | None = None,
    initial: Mapping[str, LoraFactors] | None = None,
) -> Run:
    """Train one adapter with PEFT and Trainer; the base is as it was afterwards.

    Args:
        model: the frozen base.
        task: rows; those for validation are used after training, where `batches` are given.
        leaves: last parts of the paths of the layers to adapt.
        recipe: how to train.
        num_steps: optimiser steps.
        batches: row numbers of each step; Trainer's own random batches where None.
        initial: factors to start from, by path; PEFT's own where None.

    Returns:
        Its time and losses.
    """
    config = LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, target_modules=list(leaves), lora_dropout=0.0, bias="none"
    )
    torch.manual_seed(recipe.seed)
    peft_model = get_peft_model(model, config)
    if initial is not None:
        fill(peft_model, initial)
    collator = Collator()
    order = None if batches is None else [number for batch in batches for number in batch]
    rows = [encoded(task.train[number]) for number in (order or range(len(task.train)))]
    with tempfile.TemporaryDirectory() as folder:
        trainer = _Trainer(peft_model, arguments(folder, recipe, num_steps, ordered=order is not None), collator, rows)
        clock = _Clock()
        trainer.add_callback(clock)
        trainer.train()
    counted = collator.lengths[1:num_steps]  # batches are collated in the order of the steps, some ahead of time
    work = Work(clock.ends[-1] - clock.ends[0], sum(map(len, counted)), sum(map(sum, counted)))
    run = Run(work, [float(loss) for loss in trainer.losses])
    if batches is not None:
        run.val_loss = mean_loss(peft_model.eval(), task.val)
    peft_model.unload()
    return run


def arguments(folder: str, recipe: Recipe, num_steps: int, *, ordered: bool) -> TrainingArguments:
    """Trainer's arguments for a recipe, all that is not training switched off."""
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=recipe.batch_size,
        max_steps=num_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0,
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=recipe.clip,
        seed=recipe.seed,
        use_cpu=True,
        train_sampling_strategy="sequential" if ordered else "random",
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )


def encoded(row: Example) -> dict[str, list[int]]:
    """A row as Trainer is fed: prompt and target, labels on the target."""
    prompt, target = list(row.prompt_ids), list(row.target_ids)
    return {"input_ids": prompt + target, "labels": [IGNORED] * len(prompt) + target}


class Collator:
    """Pads a batch on the right, as transformers' own collators do; notes how long their rows are."""

    def __init__(self) -> None:
        self.lengths: list[list[int]] = []

    def __call__(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        """Ids, attention mask and labels, each (batch, seq)."""
        lengths = [len(row["input_ids"]) for row in rows]
        self.lengths.append(lengths)
        seq = max(lengths)
        return {
            "input_ids": torch.tensor([row["input_ids"] + [0] * (seq - len(row["input_ids"])) for row in rows]),
            "attention_mask": torch.tensor([[1] * length + [0] * (seq - length) for length in lengths]),
            "labels": torch.tensor([row["labels"] + [IGNORED] * (seq - len(row["labels"])) for row in rows]),
        }


class _Trainer(Trainer):  # type: ignore[misc]
    """Trainer that keeps its losses."""

    def __init__(self, model: Any, args: TrainingArguments, collator: Collator, rows: list[dict[str, Any]]) -> None:
        super().__init__(model=model, args=args, data_collator=collator, train_dataset=rows)
        self.remove_callback(PrinterCallback)
        self.losses: list[Tensor] = []

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's own step; its loss is kept as it is returned."""
        loss: Tensor = super().training_step(*args, **kwargs)
        self.losses.append(loss.detach())
        return loss


class _Clock(TrainerCallback):  # type: ignore[misc]
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        """Called after optimiser and schedule."""
        self.ends.append(time.perf_counter())


def fill(peft_model: Any, initial: Mapping[str, LoraFactors]) -> None:
    """Overwrite the adapter's factors."""
    parameters = dict(peft_model.named_parameters())
    with torch.no_grad():
        for path, factors in initial.items():
            parameters[f"base_model.model.{path}.lora_A.default.weight"].copy_(factors.lora_a)
            parameters[f"base_model.model.{path}.lora_B.default.weight"].copy_(factors.lora_b)


@torch.no_grad()
def mean_loss(model: Any, rows: Sequence[Example], batch_size: int = 8) -> float:
    """Mean loss over the target tokens of rows, as transformers computes it."""
    total, collator = 0.0, Collator()
    for start in range(0, len(rows), batch_size):
        members = rows[start : start + batch_size]
        batch = collator([encoded(row) for row in members])
        device = next(model.parameters()).device
        loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
        total += float(loss) * sum(len(row.target_ids) for row in members)
    return total / sum(len(row.target_ids) for row in rows)
