"""Held-out tasks stay held out: training tasks that overlap them are reported, or left out."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lorary.data.overlap import NGRAM, SEEN, Overlap, Overlaps, find_overlaps
from lorary.data.schema import Task
from lorary.data.tasks import load_tasks
from lorary.errors import TaskError, UsageError

MODES = ("report", "drop", "drop-rows")


@dataclass(frozen=True)
class Decontamination:
    """What overlaps, and what became of it.

    Args:
        mode: `report`, `drop` or `drop-rows`.
        ngram: words of a run that counts as shared text.
        overlaps: each pair of a training task and a held-out one that share something.
        dropped: training tasks that were left out.
        dropped_rows: rows that were left out of the others, by task.
    """

    mode: str
    ngram: int
    overlaps: Sequence[Overlap] = ()
    dropped: Sequence[str] = ()
    dropped_rows: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As a document."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people: one line for each pair, and what was done."""
        if not self.overlaps:
            return ["overlap with held-out tasks: none"]
        lines = [f"overlap with held-out tasks ({self.mode}), in runs of {self.ngram} words:"]
        for pair in self.overlaps:
            reasons = [f"both name {pair.name}"] if pair.name else []
            if pair.example:
                reasons.append(f"text in {pair.train_rows} rows and {pair.heldout_rows}, such as '{pair.example}'")
            lines.append(f"  {pair.train} and {pair.heldout}: {'; '.join(reasons)}")
        if self.dropped:
            lines.append(f"  left out: {', '.join(self.dropped)}")
        if self.dropped_rows:
            lines.append(f"  rows left out: {', '.join(f'{n} of {name}' for name, n in self.dropped_rows.items())}")
        return lines


def decontaminate(
    train: Mapping[str, Task], heldout: Mapping[str, Task], *, mode: str = "report", ngram: int = NGRAM
) -> tuple[dict[str, Task], Decontamination]:
    """Find what training tasks share with held-out ones, and act on it.

    Args:
        train: tasks to train on, by name.
        heldout: tasks to keep apart, by name.
        mode: `report` keeps everything; `drop` leaves out each training task that shares a name or any text;
            `drop-rows` leaves out the rows that share text, and a task that has no training or validation rows then.
        ngram: words of a run that counts as shared text.

    Returns:
        The training tasks that are kept, and what was found.

    Raises:
        UsageError: if there is no such mode, or a run is shorter than 2 words.
        TaskError: if nothing is left to train on.
    """
    if mode not in MODES:
        raise UsageError(f"--overlap must be one of {', '.join(MODES)}", found=mode)
    if ngram < 2:
        raise UsageError("a run of words must have at least 2", found=ngram)
    overlaps = find_overlaps(train, heldout, ngram=ngram)
    if mode == "report":
        return dict(train), Decontamination(mode, ngram, overlaps.pairs)
    named = {pair.train for pair in overlaps.pairs}
    remaining = (
        {name: task for name, task in train.items() if name not in named}
        if mode == "drop"
        else {name: task for name, task in _without_rows(train, overlaps).items() if all(map(task.split, SEEN))}
    )
    if train and not remaining:
        raise TaskError(
            "training tasks must be left once what overlaps held-out tasks is gone",
            found=f"all {len(train)} overlap: {', '.join(sorted(named)[:5])}",
            remedy="--overlap report shows how; train on other tasks, or hold out others",
        )
    rows = {name: sum(map(len, overlaps.rows[name].values())) for name in sorted(overlaps.rows)}
    return remaining, Decontamination(
        mode,
        ngram,
        overlaps.pairs,
        sorted(set(train) - set(remaining)),
        {name: number for name, number in rows.items() if name in remaining and mode == "drop-rows"},
    )


def keep_apart(train: Mapping[str, Task], reference: str, mode: str) -> tuple[dict[str, Task], Decontamination]:
    """`decontaminate` against the tasks of a reference: those held out, or all of them where none is.

    Args:
        train: tasks to train on, by name.
        reference: as `lorary.data.tasks.load_tasks` takes it.
        mode: as for `decontaminate`.

    Raises:
        LoraryError: as `decontaminate` and `load_tasks`.
    """
    tasks = load_tasks(reference)
    heldout = {name: task for name, task in tasks.items() if task.role == "heldout"}
    return decontaminate(train, heldout or tasks, mode=mode)


def _without_rows(train: Mapping[str, Task], overlaps: Overlaps) -> dict[str, Task]:
    return {
        name: task
        if name not in overlaps.rows
        else replace(task, rows={**task.rows, **_clean(task, overlaps.rows[name])})
        for name, task in train.items()
    }


def _clean(task: Task, marked: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    removed = {split: set(rows) for split, rows in marked.items()}
    return {
        split: tuple(row for place, row in enumerate(task.split(split)) if place not in rows)
        for split, rows in removed.items()
    }
