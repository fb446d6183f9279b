"""In which template the base counts: that in which it does better on rows that are not reported."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lorary.data.schema import Row, Task
from lorary.evaluate.cells import BASE, Cell
from lorary.evaluate.metrics import REPORTED
from lorary.route.setting import CHAT

# Where the choice comes from: the task's own rows, the choice of most other tasks, or nothing at all.
Origin = Literal["rows", "majority", "default"]


@dataclass(frozen=True)
class BaseTemplate:
    """In which template the base counts on a task, and why.

    Args:
        task: name of the task.
        split: whose rows were looked at: `val`, else `train`; "" where the task has neither.
        rows: how many.
        scores: mean score of the base on these rows, by template.
        losses: mean loss of the base on these rows, in nats per target token, by template.
        template: the choice; "" until it is made.
        origin: where the choice comes from.
    """

    task: str
    split: str
    rows: int
    scores: Mapping[str, float]
    losses: Mapping[str, float]
    template: str = ""
    origin: Origin = "rows"


def template_rows(task: Task, number: int) -> tuple[str, Sequence[Row]]:
    """The rows of a task on which its template is chosen, never test rows.

    Args:
        task: the task.
        number: how many, at most.

    Returns:
        Their split and the rows; "" and none where the task has test rows alone.
    """
    return next(((split, rows[:number]) for split in ("val", "train") if (rows := task.split(split))), ("", ()))


def choose_templates(looked: Iterable[BaseTemplate]) -> list[BaseTemplate]:
    """Choose for each task the template of the higher score; of equal scores, that of the lower loss.

    A task without rows to look at takes the choice of most tasks that have some. Where these are level, or none has
    any, it is the chat template, which is the base's own.

    Args:
        looked: what the rows of each task say; a choice that was made before counts for nothing.

    Returns:
        The same with their choice, each task once.
    """
    by_task: dict[str, BaseTemplate] = {}
    for look in looked:
        by_task.setdefault(look.task, look)
    chosen = {task: _better(look) for task, look in by_task.items() if look.scores}
    votes = Counter(chosen.values()).most_common(2)
    is_won = bool(votes) and (len(votes) == 1 or votes[0][1] > votes[1][1])
    others = votes[0][0] if is_won else CHAT
    origin: Origin = "majority" if is_won else "default"
    return [
        replace(look, template=chosen.get(task, others), origin="rows" if task in chosen else origin)
        for task, look in by_task.items()
    ]


def _better(look: BaseTemplate) -> str:
    return min(look.scores, key=lambda name: (-look.scores[name], look.losses[name], name != CHAT))


def count_templates(cells: Iterable[Cell], chosen: Sequence[BaseTemplate]) -> list[Cell]:
    """Let the base's score in the chosen template count, or the only one where it has scores in one alone.

    Args:
        cells: of any router; those of the base in one template or two.
        chosen: of `choose_templates`.

    Returns:
        The cells with `primary` as it counts, in the order given.
    """
    cells, template_of = list(cells), {choice.task: choice.template for choice in chosen}
    counting: dict[tuple[str, str], str] = {}
    for cell in cells:
        if cell.router == BASE and (cell.template == template_of.get(cell.task) or _place(cell) not in counting):
            counting[_place(cell)] = cell.template
    return [
        replace(cell, primary=cell.template == counting[_place(cell)])
        if cell.router == BASE and cell.metric not in REPORTED
        else cell
        for cell in cells
    ]


def _place(cell: Cell) -> tuple[str, str]:
    return cell.library, cell.task
