"""Rows for the training benchmark: of about forty tokens, encoded once, for both contenders.

Builtin tasks have rows of 10 to 20 tokens. They are made longer by solved rows of the same task standing before the
question, other ones for each row: what all rows of a task share stays the builtin instruction of 3 to 6 tokens. Tasks
of a folder are taken as they are, those whose rows are nearest to forty tokens on average.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lorary.data.schema import Row, Task
from lorary.data.tasks import BUILTIN, load_tasks
from lorary.data.template import Example, Template, make_template
from lorary.keys import keyed_generator
from lorary.model.base import Base

TOKENS = 40
TRAIN_ROWS, VAL_ROWS = 160, 8
SAMPLE = 24  # rows of a task that tell how long its rows are
# An instruction as data sets of instructions have them, more than 64 tokens long; {name} makes each task's its own.
PREFIX = (
    "In this task, called {name}, you are given a short text and a question about it. Read the text with care, work "
    "out the answer, and write it down in as few words as you can. Give the answer alone. If several answers seem "
    "right, choose the one that fits best.\n"
)


@dataclass(frozen=True)
class TaskRows:
    """The encoded rows of one task."""

    name: str
    train: Sequence[Example]
    val: Sequence[Example]

    @property
    def mean_tokens(self) -> float:
        """Tokens of a training row, prompt and target together, on average."""
        return sum(num_tokens(row) for row in self.train) / len(self.train)

    @property
    def shared_tokens(self) -> int:
        """Tokens that the prompts of all training rows begin with."""
        prompts = sorted(row.prompt_ids for row in self.train)  # the first and the last in order share the least
        pairs = zip(prompts[0], prompts[-1], strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def num_tokens(row: Example) -> int:
    """Tokens of a row, prompt and target together."""
    return len(row.prompt_ids) + len(row.target_ids)


def load_rows(reference: str, base: Base, num_tasks: int, *, prefix: str = "") -> list[TaskRows]:
    """The rows of the tasks whose rows are nearest to `TOKENS` tokens on average.

    Args:
        reference: as `lorary.data.tasks.load_tasks` takes it.
        base: whose tokenizer encodes them.
        num_tasks: how many tasks.
        prefix: put before every prompt; `{name}` in it becomes the task's name. It does not decide which tasks are
            taken.

    Returns:
        Tasks by name.
    """
    template = make_template("plain", base.tokenizer)
    tasks = [task for task in load_tasks(reference).values() if task.role == "train"]
    fill = TOKENS if reference == BUILTIN else 0

    def distance(task: Task) -> tuple[float, str]:
        return abs(encode_task(task, template, fill=fill, most=SAMPLE).mean_tokens - TOKENS), task.name

    chosen = sorted(tasks, key=distance)[:num_tasks]
    if len(chosen) < num_tasks:
        raise SystemExit(f"'{reference}' must have {num_tasks} tasks to train on; found: {len(chosen)}")
    by_name = sorted(chosen, key=lambda task: task.name)
    return [encode_task(task, template, fill=fill, prefix=prefix.format(name=task.name)) for task in by_name]


def encode_task(task: Task, template: Template, *, fill: int = 0, prefix: str = "", most: int = TRAIN_ROWS) -> TaskRows:
    """Encode the rows of one task.

    Args:
        task: with training and validation rows.
        template: how a row becomes ids.
        fill: tokens up to which solved rows are put before each row's question; 0 leaves the rows as they are.
        prefix: text before every prompt.
        most: training rows to encode.
    """
    pool = task.split("train")

    def encode(split: str, number: int, row: Row) -> Example:
        source = lengthened(row, drawn_rows(pool, task.name, split, number), template, fill) if fill else row.source
        return template.encode(prefix + source, row.target)

    train = [encode("train", number, row) for number, row in enumerate(pool[:most])]
    return TaskRows(task.name, train, [encode("val", n, row) for n, row in enumerate(task.split("val")[:VAL_ROWS])])


def drawn_rows(pool: Sequence[Row], *key: object) -> Iterator[Row]:
    """Rows in an order that depends on the key alone."""
    order = torch.randperm(len(pool), generator=keyed_generator("solved rows", *key))
    return (pool[index] for index in order.tolist())


def lengthened(row: Row, solved: Iterator[Row], template: Template, fill: int) -> str:
    """The row's source behind as many solved rows as come nearest to `fill` tokens."""
    source, missing = row.source, abs(fill - num_tokens(template.encode(row.source, row.target)))
    for other in solved:
        if other.source == row.source:
            continue  # a row does not answer itself
        longer = f"{other.source} {other.target}\n{source}"
        missing_then = abs(fill - num_tokens(template.encode(longer, row.target)))
        if missing_then >= missing:
            break
        source, missing = longer, missing_then
    return source
