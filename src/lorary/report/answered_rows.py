"""Every test row with its answers and scores, as a small JSON document: each text is stored once per task."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from lorary.report.table_model import SPLITS, Cell, ScoreTable

# Characters of JSON that the texts of a page may take; longer texts lose their middle until they fit.
MOST_TEXT = 6_000_000
LENGTHS = (4000, 2000, 1000, 500, 200)
GAP = " […] "


def answered_rows(table: ScoreTable) -> dict[str, Any] | None:
    """The rows of all tasks that were scored row by row; None where there are none.

    Args:
        table: the evaluation.

    Returns:
        `columns`; `experts`; `most`, the length to which texts were cut, None where all are whole; `tasks`, each with
        its prompts, references, texts of answers, and per column the position of each row's answer among these texts,
        its score in hundredths and the position of its strongest expert (-1: the base); None where nothing is known.
    """
    lines = [line for split in table.splits for line in table.lines(split) if line.name in table.rows]
    if not lines:
        return None
    whole = list(_texts(table, [line.name for line in lines]))
    most = next((length for length in (None, *LENGTHS) if _size(whole, length) <= MOST_TEXT), LENGTHS[-1])
    usage = {(entry["router"], entry["task"]): entry["strongest"] for entry in table.routing_usage}
    experts = sorted({name for strongest in usage.values() for name, _ in strongest if name is not None})
    position: dict[str | None, int] = {None: -1, **{name: i for i, name in enumerate(experts)}}
    tasks = []
    for line in lines:
        texts: dict[str, int] = {}
        cells = [table.primary.get((router, line.name)) for router in table.routers]
        answers = [_positions(cell, texts, most) for cell in cells]
        rows = table.rows[line.name]
        tasks.append({
            "task": line.name,
            "family": line.family,
            "split": SPLITS[line.split],
            "prompts": [cut(row["prompt"], most) for row in rows],
            "references": [[cut(text, most) for text in row["references"]] for row in rows],
            "texts": list(texts),
            "answers": answers,
            "values": [cell and [round(100 * value) for value in cell["values"]] for cell in cells],
            "experts": [
                [position[name] for name, _ in usage[router, line.name]] if (router, line.name) in usage else None
                for router in table.routers
            ],
        })  # fmt: skip
    return {"columns": table.routers, "experts": experts, "most": most, "tasks": tasks}


def cut(text: str, most: int | None) -> str:
    """A text of at most so many characters and a mark; what it loses is its middle.

    >>> cut("abcdefgh", 4)
    'ab […] gh'
    """
    return text if most is None or len(text) <= most else text[: most // 2] + GAP + text[-(most // 2) :]


def _texts(table: ScoreTable, tasks: Sequence[str]) -> Iterable[str]:
    for task in tasks:
        for row in table.rows[task]:
            yield row["prompt"]
            yield from row["references"]
        cells = (table.primary.get((router, task)) for router in table.routers)
        yield from dict.fromkeys(answer for cell in cells if cell for answer in cell.get("answers", ()))


def _size(texts: Iterable[str], most: int | None) -> int:
    return sum(len(json.dumps(cut(text, most))) for text in texts)


def _positions(cell: Cell | None, texts: dict[str, int], most: int | None) -> list[int] | None:
    """Positions of a cell's answers among the texts of its task, which gains new ones; None without answers."""
    answers: Sequence[str] = (cell or {}).get("answers", ())
    return [texts.setdefault(cut(answer, most), len(texts)) for answer in answers] or None
