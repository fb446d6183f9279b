"""The top of the page: what came out in one sentence, how sure that is, and where the base alone does better."""

from collections.abc import Mapping, Sequence
from typing import Any

from lorary.evaluate.page.board import BASE, ORACLE, SPLITS, Board, Mean
from lorary.evaluate.page.markup import counted, enumerated, hundredths, signed, text

# So many named tasks are shown at once; more are folded, router by router.
OPEN_ENTRIES = 24


def headline(board: Board) -> str:
    """The result as HTML: a sentence per split and the paired differences of the main router."""
    sentences = [sentence for split in board.splits if (sentence := _sentence(board, split))]
    return f'<p class="lead">{" ".join(sentences)}</p>{_differences(board)}'


def _sentence(board: Board, split: str) -> str:
    means = {router: mean for router in board.routers if (mean := board.mean(router, split))}
    first = board.main if board.main in means else next(iter(means), None)
    if first is None:
        return ""
    tasks = f"the {counted(means[first].tasks, f'{SPLITS[split]} task')}"
    start = f"On {tasks} {_called(first)} scores <strong>{hundredths(means[first].value)}</strong> of 100 on average"
    rest = [f"{hundredths(mean.value)} for {_called(name)}" for name, mean in means.items() if name != first]
    return f"{start}, against {enumerated(rest)}." if rest else f"{start}."


def _called(router: str) -> str:
    return "the base alone" if router == BASE else f"<em>{text(router)}</em>"


def _differences(board: Board) -> str:
    """A small table: the main router minus every other one, on each split."""
    rows = []
    for other in board.routers:
        found = [board.difference(board.main or "", other, split) for split in board.splits]
        if other not in (board.main, ORACLE) and any(found):
            label = f"{text(board.main)} − {text(other)}"
            rows.append(f'<tr><th scope="row">{label}</th>{"".join(map(_difference_cell, found))}</tr>')
    if not rows:
        return ""
    heads = "".join(f'<th scope="col">{SPLITS[split]}</th>' for split in board.splits)
    return (
        '<div class="scroll"><table class="differences"><caption>Paired difference of the means, in points, with its '
        f'95 % interval</caption><thead><tr><th scope="col">difference</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _difference_cell(mean: Mean | None) -> str:
    if mean is None:
        return "<td>–</td>"
    kind, word = "even", "no clear difference"
    if mean.low > 0:
        kind, word = "up", "better"
    elif mean.high < 0:
        kind, word = "down", "worse"
    interval = f'<span class="interval">[{signed(mean.low)}, {signed(mean.high)}]</span>'
    return f'<td><b>{signed(mean.value)}</b> {interval} <span class="verdict {kind}">{word}</span></td>'


def guard_box(board: Board) -> str:
    """The base guard as HTML: each task on which the base beats a router, by name; or that there is none."""
    if not board.guard:
        return (
            '<aside class="guard clear"><h3>Base guard: clear</h3><p>On no task does the base alone do better than a '
            "router.</p></aside>"
        )
    order = sorted(board.routers, key=lambda router: (router != board.main, board.routers.index(router)))
    groups = {router: [entry for entry in board.guard if entry["router"] == router] for router in order}
    unfolded = len(board.guard) <= OPEN_ENTRIES
    tasks = len({entry["task"] for entry in board.guard})
    boxes = [_guard_group(board, router, entries, unfolded) for router, entries in groups.items() if entries]
    free = [text(router) for router, entries in groups.items() if not entries and router != BASE]
    none = f"<p>On no task does it do better than {enumerated(free)}.</p>" if free else ""
    return (
        f'<aside class="guard"><h3>Base guard: the base alone does better on {counted(tasks, "task")} of '
        f"{len(board.tasks)}</h3><p>Each task on which it beats a router is named, with the base's value first. "
        f"<b>Bold</b>: the two 95 % intervals do not even overlap.</p>{''.join(boxes)}{none}</aside>"
    )


def _guard_group(board: Board, router: str, entries: Sequence[Mapping[str, Any]], unfolded: bool) -> str:
    ranked = sorted(entries, key=lambda entry: (entry["value"] - entry["base"], entry["task"]))
    items = "".join(f"<li>{_guard_entry(board, entry)}</li>" for entry in ranked)
    opened = " open" if unfolded or router == board.main else ""
    summary = f"base beats <em>{text(router)}</em> on {counted(len(entries), 'task')}"
    return f"<details{opened}><summary>{summary}</summary><ul>{items}</ul></details>"


def _guard_entry(board: Board, entry: Mapping[str, Any]) -> str:
    base = board.primary.get((BASE, entry["task"]))
    cell = board.primary.get((entry["router"], entry["task"]))
    name = text(entry["task"])
    if base and cell and base["low"] > cell["high"]:
        name = f"<b>{name}</b>"
    split = SPLITS.get(entry["split"], entry["split"])
    return f"{name} <small>{hundredths(entry['base'])} &gt; {hundredths(entry['value'])}, {text(split)}</small>"
