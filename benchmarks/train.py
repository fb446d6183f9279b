"""Training many adapters in one pass, beside PEFT and transformers' Trainer, one adapter after the other.

    python benchmarks/train.py [--tasks builtin] [--cases train-1,train-16] [--threads N] [--json]

Both sides train over the same weights in one process, on the CPU, and take turns: after each block of our steps the
peer trains some of its adapters. Same rows (about 40 tokens), rank, alpha, layers, batch per expert, AdamW, learning
rate, clipping and number type. Figures are medians over the blocks; `spread` holds the least and the largest ratio of
a block of ours to the peer's turn after it.

* `examples/s`, `tokens/s`: of all steps on our side, of all but each adapter's first on the peer's; its set-up is not
  counted, and evaluations are not counted. Tokens are those of the rows, prompt and target, without padding.
* `peak memory`: the largest resident set while a side had its turns, minus the resident set before, the base being
  resident.
* `floor`: what the bare matrix products of our steps would take, padding left out, measured between the blocks.
* `train-16-prefix`: the same rows behind an instruction of 64 tokens or more, another one for each task.
* `train-16-same-batches`: Trainer fed our batches, from our initial weights: speed, and how far the losses are apart.
"""

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from memory import MIB, settle, status
from train_ours import Targets, batches_of, floor_of, initial_factors, layouts, train_all
from train_peer import Recipe, Run, Work, train_adapter, twin
from train_rows import PREFIX, TaskRows, load_rows

from lorary.lora.targets import ALL_LINEAR, find_targets
from lorary.model.base import load_base

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Case:
    """One case of the benchmark.

    Args:
        name: of its rows.
        num_experts: adapters on our side, all in one pass.
        num_steps: of each of them.
        block: our steps between two turns of the peer.
        adapters: adapters that the peer trains in a turn, evenly taken from short rows to long ones.
        peer_steps: of each of them, the first not counted.
        target_modules: layers to adapt.
        prefix: put before each row.
        same_batches: whether the peer also trains one adapter a turn on our batches, for all `num_steps`.
    """

    name: str
    num_experts: int
    num_steps: int
    block: int
    adapters: int
    peer_steps: int
    target_modules: tuple[str, ...] = ATTENTION
    prefix: str = ""
    same_batches: bool = False


CASES = (
    Case("train-1", 1, num_steps=16, block=4, adapters=1, peer_steps=5),
    Case("train-4", 4, num_steps=8, block=2, adapters=4, peer_steps=2),
    Case("train-16", 16, num_steps=10, block=2, adapters=4, peer_steps=3, same_batches=True),
    Case("train-16-prefix", 16, num_steps=4, block=1, adapters=3, peer_steps=2, prefix=PREFIX),
    Case("train-16-all-linear", 16, num_steps=4, block=2, adapters=2, peer_steps=2, target_modules=(ALL_LINEAR,)),
)


class Contest:
    """A case being run: our training, interrupted by the peer's turns and by measurements of the floor.

    Args:
        case: what is run.
        model: the base; the peer works on a twin of it.
        tasks: rows of each expert.
        recipe: how both train.
    """

    def __init__(self, case: Case, model: Any, tasks: Sequence[TaskRows], recipe: Recipe) -> None:
        self.case, self.model, self.tasks, self.recipe = case, model, tasks, recipe
        self.targets: Targets = find_targets(model, case.target_modules)
        self.leaves = sorted({path.rsplit(".", 1)[-1] for path in self.targets})
        self.twin = twin(model)
        self.order = from_the_middle(tasks)
        self.layouts = layouts(model, tasks, recipe, case.num_steps)
        self.turns: list[Work] = []
        self.same: dict[str, Run] = {}
        self.floors: list[float] = []
        self.peer_peak = 0

    def run(self) -> list[dict[str, Any]]:
        """Run the case.

        Returns:
            Rows of the table.
        """
        resident = settle()
        ours, done = train_all(
            self.model, self.tasks, self.targets, self.recipe, self.case.num_steps,
            block=self.case.block, take_turn=self.take_turn,
        )  # fmt: skip
        peaks = ((ours.peak - resident) / MIB, self.peer_peak / MIB)
        rows = speed_rows(self.case.name, ours.blocks, self.turns, self.floors, peaks)
        if self.same:
            name = f"{self.case.name}-same-batches"
            rows += speed_rows(name, ours.blocks, [run.work for run in self.same.values()])
            rows += equality_rows(name, {task: (done[task], run) for task, run in self.same.items()})
        return rows

    def take_turn(self, number: int) -> None:
        """The peer trains its adapters of this turn; the floor of our last block is measured."""
        steps = self.layouts[number * self.case.block : (number + 1) * self.case.block]
        self.floors.append(floor_of(self.twin, self.targets, steps, self.recipe.rank))
        resident = settle()
        forget_peak()
        self.turns.append(sum((self.train_one(task).work for task in self.adapters_of(number)), Work()))
        self.peer_peak = max(self.peer_peak, status("VmHWM") - resident)
        if self.case.same_batches:
            task = self.order[number % len(self.order)]
            plan = batches_of(task, self.recipe, self.case.num_steps)
            initial = initial_factors(self.model, task, self.targets, self.recipe)
            self.same[task.name] = self.train_one(task, self.case.num_steps, batches=plan, initial=initial)
        settle()
        forget_peak()
        print(f"  {self.case.name}: block {number + 1} of {self.case.num_steps // self.case.block}", file=sys.stderr)

    def adapters_of(self, number: int) -> list[TaskRows]:
        """The tasks of one turn of the peer."""
        first = number * self.case.adapters
        return [self.order[i % len(self.order)] for i in range(first, first + self.case.adapters)]

    def train_one(self, task: TaskRows, num_steps: int | None = None, **settings: Any) -> Run:
        """One adapter of the peer."""
        return train_adapter(self.twin, task, self.leaves, self.recipe, num_steps or self.case.peer_steps, **settings)


def from_the_middle(tasks: Sequence[TaskRows]) -> list[TaskRows]:
    """Tasks of middling length first, then ever shorter and longer ones in turn: neighbours average alike."""
    ranked = sorted(tasks, key=lambda task: (task.mean_tokens, task.name))
    ends: list[TaskRows] = []
    while ranked:
        ends.append(ranked.pop(0 if len(ends) % 2 else -1))
    return ends[::-1]


def forget_peak() -> None:
    """Let the kernel count this process's largest resident set anew."""
    Path("/proc/self/clear_refs").write_text("5")


def speed_rows(
    case: str,
    ours: Sequence[Work],
    peer: Sequence[Work],
    floors: Sequence[float] = (),
    peaks: tuple[float, float] | None = None,
) -> list[dict[str, Any]]:
    """Examples and tokens per second; with them memory and the share of the floor, where measured."""
    amounts: dict[str, Callable[[Work], int]] = {"examples": lambda work: work.rows, "tokens": lambda work: work.tokens}
    rows = []
    for unit, amount in amounts.items():
        mine, theirs = ([amount(work) / work.seconds for work in side] for side in (ours, peer))
        bare = [amount(work) / floor for work, floor in zip(ours, floors, strict=False)]
        entry = harness.row(
            case, unit, f"{unit}/s", "higher", ours=statistics.median(mine), peer=statistics.median(theirs),
            floor=statistics.median(bare) if bare else None,
        )  # fmt: skip
        ratios = [a / b for a, b in zip(mine, theirs, strict=False)]
        rows.append({**entry, "spread": [min(ratios), max(ratios)]})
    if floors:
        share = statistics.median(floor / work.seconds for work, floor in zip(ours, floors, strict=False))
        rows.append(harness.row(case, "share of the arithmetic floor", "1", "higher", ours=share))
    if peaks:
        rows.append(harness.row(case, "peak memory over the base", "MiB", "lower", ours=peaks[0], peer=peaks[1]))
    return rows


def equality_rows(case: str, pairs: dict[str, Any]) -> list[dict[str, Any]]:
    """How far both sides' losses are apart where they saw the same rows from the same weights.

    Args:
        case: of the rows.
        pairs: our finished unit and the peer's run, by task.
    """
    apart = max(
        abs(a - b) for unit, run in pairs.values() for a, b in zip(unit.train_losses[:10], run.losses[:10], strict=True)
    )
    mine = statistics.mean(unit.val_losses[-1][1] for unit, _ in pairs.values())
    theirs = statistics.mean(run.val_loss for _, run in pairs.values())
    return [
        harness.row(case, "first 10 losses, furthest apart", "nats", "lower", ours=apart),
        harness.row(case, "validation loss after the last step", "nats", "lower", ours=mine, peer=theirs),
    ]


def run_case(case: Case, base: Any, tasks: str, recipe: Recipe) -> list[dict[str, Any]]:
    """Load the rows of a case and run it."""
    rows = load_rows(tasks, base, case.num_experts, prefix=case.prefix)
    lengths, shared = [task.mean_tokens for task in rows], [task.shared_tokens for task in rows]
    print(
        f"{case.name}: {len(rows)} tasks, {min(lengths):.0f} to {max(lengths):.0f} tokens a row, the first "
        f"{min(shared)} to {max(shared)} of them shared by a task's rows",
        file=sys.stderr,
    )
    return Contest(case, base.model, rows, recipe).run()


def main() -> None:
    """Run the cases asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default="builtin", help="builtin, or a folder of tasks")
    parser.add_argument("--base", default="embedded")
    parser.add_argument("--cases", default=",".join(case.name for case in CASES))
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice by default")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    unknown = set(options.cases.split(",")) - {case.name for case in CASES}
    if unknown:
        parser.error(f"cases must be among {', '.join(case.name for case in CASES)}; found: {', '.join(unknown)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    base = load_base(options.base, device="cpu")  # its memory is read from /proc, its clock never waits for a device
    for parameter in base.model.parameters():
        parameter.data = parameter.data.clone()  # out of the mapped file, so that all of it is resident from the start
    warm_up = Case("warm-up", 1, num_steps=2, block=1, adapters=1, peer_steps=2)
    run_case(warm_up, base, options.tasks, Recipe())
    chosen = [case for case in CASES if case.name in options.cases.split(",")]
    harness.report([row for case in chosen for row in run_case(case, base, options.tasks, Recipe())], options.json)


if __name__ == "__main__":
    main()
