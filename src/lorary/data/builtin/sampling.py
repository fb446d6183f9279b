"""How the builtin tasks draw their rows: the same in every process and every version of Python."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from lorary.data.schema import Row, Task, make_task

T = TypeVar("T")

NUM_ROWS = {"train": 160, "val": 32, "test": 40}
# Shares of a table's entities; the rest is for training. Tests get more than in large domains, where rows are free.
SHARES = {"val": 0.1, "test": 0.3}


class Item(NamedTuple):
    """A question and its answer, before it has a task and a split."""

    question: str
    answer: str


Make = Callable[["Dice"], Item]
Splits = Mapping[str, Sequence[Item]]


class Dice:
    """Choices out of a seed.

    Built on `random()` alone: the only method of `random.Random` whose sequence Python promises never to change.

    Args:
        seed: any text.
    """

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed).random

    def integer(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both possible."""
        return low + int(self._random() * (high - low + 1))

    def pick(self, choices: Sequence[T]) -> T:
        """One of the choices, all equally likely."""
        return choices[self.integer(0, len(choices) - 1)]

    def several(self, choices: Sequence[T], num: int) -> list[T]:
        """`num` different choices in random order."""
        return self.shuffled(choices)[:num]

    def shuffled(self, choices: Sequence[T]) -> list[T]:
        """All choices in random order."""
        keyed = [(self._random(), position) for position in range(len(choices))]
        return [choices[position] for _, position in sorted(keyed)]


@dataclass(frozen=True)
class SamplingPlan:
    """How one builtin task is made.

    Args:
        name: label of the task.
        family: the family it belongs to.
        instruction: stands before every question, and differs between tasks, so that a router can tell them apart.
        draw: makes the questions of every split.
        options: all answers, for multiple choice; empty for free answers.
        role: "train" or "heldout".
    """

    name: str
    family: str
    instruction: str
    draw: Callable[[Dice], Splits]
    options: tuple[str, ...] = ()
    role: str = "train"

    def build(self, seed: int) -> Task:
        """The task of a seed: depends on the seed and the task's name, never on the other tasks."""
        splits = self.draw(Dice(f"{seed}:{self.name}"))
        rows = [self._row(split, item) for split, items in splits.items() for item in items]
        return make_task(self.name, rows, "builtin", role=self.role, metric="acc" if self.options else "em")

    def _row(self, split: str, item: Item) -> Row:
        return Row(
            task=self.name,
            split=split,
            source=f"{self.instruction} {item.question}\nAnswer:",
            target=item.answer,
            family=self.family,
            options=self.options,
        )


def drawn(make: Make) -> Callable[[Dice], Splits]:
    """Rows out of a large domain: drawn until there are enough different questions; no question is in two splits."""

    def draw(dice: Dice) -> Splits:
        items: dict[str, Item] = {}
        while len(items) < sum(NUM_ROWS.values()):
            item = make(dice)
            items.setdefault(item.question, item)
        remaining = iter(items.values())
        return {split: [next(remaining) for _ in range(num)] for split, num in NUM_ROWS.items()}

    return draw


def tabled(*groups: Sequence[tuple[str, str]]) -> Callable[[Dice], Splits]:
    """Rows out of a table of facts, each once: a fact that is tested was never in training."""

    def draw(dice: Dice) -> Splits:
        return {split: [Item(*entity) for entity in part] for split, part in divide(dice, groups).items()}

    return draw


def drawn_from(groups: Sequence[Sequence[T]], make: Callable[[Dice, T], Item]) -> Callable[[Dice], Splits]:
    """Rows about few entities, drawn many times: an entity that is tested was never in training."""

    def draw(dice: Dice) -> Splits:
        splits: dict[str, list[Item]] = {}
        for split, part in divide(dice, groups).items():
            items: dict[str, Item] = {}
            while len(items) < NUM_ROWS[split]:
                item = make(dice, part[len(items) % len(part)])
                items.setdefault(item.question, item)
            splits[split] = list(items.values())
        return splits

    return draw


def words(text: str) -> tuple[str, ...]:
    """The words of a list written as running text."""
    return tuple(text.split())


def divide(dice: Dice, groups: Sequence[Sequence[T]]) -> dict[str, list[T]]:
    """Every entity in exactly one split; every group (the members of a class) in the same shares, in random order."""
    splits: dict[str, list[T]] = {"train": [], "val": [], "test": []}
    for group in groups:
        shuffled = dice.shuffled(group)
        num_test, num_val = (round(SHARES[split] * len(group)) for split in ("test", "val"))
        splits["test"] += shuffled[:num_test]
        splits["val"] += shuffled[num_test : num_test + num_val]
        splits["train"] += shuffled[num_test + num_val :]
    return {split: dice.shuffled(entities) for split, entities in splits.items()}
