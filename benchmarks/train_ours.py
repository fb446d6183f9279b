"""Our side of the training benchmark: all adapters in one pass, which halts between blocks of steps for the peer."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from floor import floor_seconds
from memory import status
from train_peer import Recipe, Work
from train_rows import TaskRows, num_tokens

from lorary.adapter import LoraFactors
from lorary.data.batching import input_length, plan_batches
from lorary.data.packing import Group, MicroBatch, micro_batches
from lorary.model.logits import can_pack
from lorary.train.callbacks import Callback
from lorary.train.loop import train_queue
from lorary.train.optimiser import OptimiserSettings
from lorary.train.stack import expert_stack
from lorary.train.units import Job, LoopSettings, TrainedUnit

Targets = Mapping[str, tuple[int, int]]  # (d_in, d_out) by the path of the layer


def loop_settings(recipe: Recipe) -> LoopSettings:
    """The recipe in our words: no warm-up, linear decay, an evaluation before the first step and after the last."""
    optimiser = OptimiserSettings(recipe.learning_rate, warmup=0.0, clip=recipe.clip)
    return LoopSettings(optimiser, recipe.batch_size, num_evals=1, seed=recipe.seed)


def jobs_for(tasks: Sequence[TaskRows], recipe: Recipe, num_steps: int) -> list[Job]:
    """One expert per task."""
    return [Job(task.name, task.train, task.val, num_steps, recipe.rank, recipe.alpha) for task in tasks]


def batches_of(task: TaskRows, recipe: Recipe, num_steps: int) -> list[list[int]]:
    """Row numbers of each of the steps that we train a task's expert with."""
    lengths = [input_length(row) for row in task.train]
    return plan_batches(lengths, recipe.batch_size, num_steps, recipe.seed, task.name)


def initial_factors(model: Any, task: TaskRows, targets: Targets, recipe: Recipe) -> dict[str, LoraFactors]:
    """What we start a task's expert from, by path."""
    settings, [job] = loop_settings(recipe), jobs_for([task], recipe, num_steps=1)
    stack = expert_stack(model, targets, [job], num_slots=1)
    stack.fill(0, job, settings.seed, settings.init, settings.init_scale)
    return stack.result(0, job, stack.parameters).adapters[task.name]


def layouts(model: Any, tasks: Sequence[TaskRows], recipe: Recipe, num_steps: int) -> list[list[MicroBatch]]:
    """The micro-batches of each step, as the training lays them out: they say what has to be computed."""
    plans = [batches_of(task, recipe, num_steps) for task in tasks]
    steps = []
    for step in range(num_steps):
        groups = [
            Group(slot, 0, [task.train[row] for row in plan[step]], range(recipe.batch_size))
            for slot, (task, plan) in enumerate(zip(tasks, plans, strict=True))
        ]
        steps.append(micro_batches(groups, loop_settings(recipe).max_tokens, share_prefix=can_pack(model)))
    return steps


def floor_of(model: Any, targets: Targets, steps: Sequence[Sequence[MicroBatch]], rank: int) -> float:
    """Seconds that the bare matrix products of some steps take, padding left out.

    Measured on the micro-batch of middling size, whose target tokens are as many as there are on average; the others
    are taken to cost as much per token.
    """
    micros = sorted((micro for step in steps for micro in step), key=num_computed)
    total, middle = sum(map(num_computed, micros)), micros[len(micros) // 2]
    tokens, labels = num_computed(middle), sum(len(micro.batch.labels) for micro in micros)
    seconds = floor_seconds(
        model, targets, tokens=tokens, target_tokens=max(1, round(labels * tokens / total)), rank=rank,
        num_units=len(set(middle.slots.tolist())), repeats=1,
    )  # fmt: skip
    return seconds * total / tokens


def num_computed(micro: MicroBatch) -> int:
    """Tokens of a micro-batch without padding, those that rows share counted once."""
    return sum(piece.stop - piece.start for piece in micro.pieces)


class Turns(Callback):
    """Times the steps of a training in blocks, evaluations left out, and lets others have a turn after each block.

    Args:
        tokens: tokens of the rows of each step.
        rows: rows of each step.
        block: steps of a block.
        take_turn: called with the number of the block that has just ended; its time is not counted.
    """

    def __init__(self, tokens: Sequence[int], rows: int, block: int, take_turn: Callable[[int], None]) -> None:
        self.blocks: list[Work] = []
        self.peak = 0  # bytes, largest resident set while it was our turn
        self._tokens, self._rows, self._block, self._take_turn = tokens, rows, block, take_turn
        self._work, self._steps, self._mark = Work(), 0, 0.0

    def on_start(self, jobs: Sequence[Job]) -> None:
        """The clock starts."""
        self._mark = time.perf_counter()

    def on_eval(self, *_args: Any) -> None:
        """What went before was an evaluation."""
        self._mark = time.perf_counter()

    def on_step(self, *_args: Any) -> None:
        """One step of all experts is done."""
        self._work += Work(time.perf_counter() - self._mark, self._rows, self._tokens[self._steps])
        self._steps += 1
        if self._steps % self._block == 0:
            self.peak = max(self.peak, status("VmHWM"))
            self.blocks.append(self._work)
            self._work = Work()
            self._take_turn(len(self.blocks) - 1)
        self._mark = time.perf_counter()


def train_all(
    model: Any,
    tasks: Sequence[TaskRows],
    targets: Targets,
    recipe: Recipe,
    num_steps: int,
    *,
    block: int,
    take_turn: Callable[[int], None],
) -> tuple[Turns, dict[str, TrainedUnit]]:
    """Train one expert per task in one pass.

    Args:
        model: the frozen base.
        tasks: their rows.
        targets: layers to adapt.
        recipe: how to train.
        num_steps: optimiser steps of each expert.
        block: steps between two turns of the peer.
        take_turn: the peer's turn, given the number of our block before it.

    Returns:
        Time and peak memory of our blocks, and the finished experts by name.
    """
    plans = [(task, batches_of(task, recipe, num_steps)) for task in tasks]
    tokens = [sum(num_tokens(task.train[row]) for task, plan in plans for row in plan[s]) for s in range(num_steps)]
    turns = Turns(tokens, len(tasks) * recipe.batch_size, block, take_turn)
    jobs, done = jobs_for(tasks, recipe, num_steps), list[TrainedUnit]()
    stack = expert_stack(model, targets, jobs, len(jobs))
    train_queue(model, jobs, stack, loop_settings(recipe), on_finish=done.append, callbacks=[turns])
    return turns, {unit.name: unit for unit in done}
