"""The top of the page: what came out in one sentence, how sure that is, and where the base alone does better."""

from collections.abc import Mapping, Sequence
from typing import Any

from lorary.report.markup import counted, enumerated, hundredths, left_out_words, signed, text
from lorary.report.table_model import BASE, SPLITS, Board, Mean, is_told

# So many named tasks are shown at once; more are folded, router by router.
OPEN_ENTRIES = 24
# So many other columns are named in a sentence.
MOST_NAMED = 5
# Class and words of each verdict.
VERDICTS = {"ahead": ("up", "better"), "behind": ("down", "worse"), "level": ("even", "no clear difference")}


def headline(board: Board) -> str:
    """The result as HTML: a sentence per split about its best router, and the paired differences of that."""
    sentences = [sentence for split in board.splits if (sentence := _sentence(board, split))]
    return f'<p class="lead">{" ".join(sentences)}</p>{_differences(board)}'


def _sentence(board: Board, split: str) -> str:
    means = {router: mean for router in board.routers if (mean := board.mean(router, split))}
    first = board.best(split) or next(iter(means), None)
    if first is None:
        return ""
    tasks = f"the {counted(means[first].tasks, f'{SPLITS[split]} task')}"
    start = f"On {tasks} {_called(first)} scores <strong>{hundredths(means[first].value)}</strong> of 100 on average"
    rest = [f"{hundredths(means[name].value)} for {_called(name)}" for name in _named(means, first)]
    base = means.get(BASE)
    behind = " No router reaches the base." if base and first != BASE and base.value > means[first].value else ""
    return f"{start}, against {enumerated(rest)}.{behind}" if rest else f"{start}."


def _named(means: Mapping[str, Mean], first: str) -> list[str]:
    """The columns that the sentence names beside its subject: all, or where they are many base, best and oracle."""
    others = [name for name in means if name != first]
    if len(others) <= MOST_NAMED:
        return others
    library = first.rpartition(": ")[0]
    best = max((name for name in others if not is_told(name)), key=lambda name: means[name].value)
    oracle = [name for name in others if is_told(name) and name.rpartition(": ")[0] == library]
    return [name for name in others if name in (BASE, best, *oracle)]


def _called(router: str) -> str:
    return "the base alone" if router == BASE else f"<em>{text(router)}</em>"


def _differences(board: Board) -> str:
    """A small table: the best router of each split minus every other one, on all splits."""
    rows, shown = [], set[frozenset[str]]()
    for best in dict.fromkeys(filter(None, (board.best(split) or board.main for split in board.splits))):
        for other in board.routers:
            found = [board.difference(best, other, split) for split in board.splits]
            if other != best and not is_told(other) and any(found) and {best, other} not in shown:
                shown.add(frozenset({best, other}))
                label = f"{text(best)} − {text(other)}"
                rows.append(f'<tr><th scope="row">{label}</th>{"".join(map(_difference_cell, found))}</tr>')
    if not rows:
        return ""
    heads = "".join(f'<th scope="col">{SPLITS[split]}</th>' for split in board.splits)
    caption = (
        "Paired difference of the means, in points, with its 95 % interval over rows; in braces over tasks, where "
        "there are six of them"
    )
    return (
        f'<div class="scroll"><table class="differences"><caption>{caption}</caption><thead><tr>'
        f'<th scope="col">difference</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _difference_cell(mean: Mean | None) -> str:
    if mean is None:
        return "<td>–</td>"
    kind, word = VERDICTS[mean.verdict]
    where = "" if mean.is_wider or mean.verdict == "level" else " on these tasks"
    wide = ""
    if mean.tasks_low is not None and mean.tasks_high is not None:
        wide = f" {{{signed(mean.tasks_low)}, {signed(mean.tasks_high)}}}"
    interval = f'<span class="interval">[{signed(mean.low)}, {signed(mean.high)}]{wide}</span>'
    return f'<td><b>{signed(mean.value)}</b> {interval} <span class="verdict {kind}">{word}{where}</span></td>'


def guard_box(board: Board) -> str:
    """The base guard as HTML: each task on which the base beats a router, by name; or that there is none."""
    if BASE not in board.routers:
        return '<aside class="guard"><h3>Base guard: the base has no score</h3></aside>'
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
        f"<b>Bold</b>: the difference is clear, row by row (p &lt; 0.05).</p>{''.join(boxes)}{none}</aside>"
    )


def failure_box(board: Board) -> str:
    """The cells that could not be scored, as HTML; nothing where there are none."""
    if not board.failures:
        return ""
    items = "".join(f"<li>{_failure(failure)}</li>" for failure in board.failures)
    opened = " open" if len(board.failures) <= OPEN_ENTRIES else ""
    title = f"{counted(len(board.failures), 'cell')} could not be scored"
    left_out = left_out_words([(entry["task"], entry["router"]) for entry in board.left_out])
    said = f"<p>{text(left_out)}.</p>" if left_out else ""
    return (
        f'<aside class="guard"><details{opened}><summary><b>{title}</b></summary><ul>{items}</ul></details>'
        f"{said}</aside>"
    )


def _failure(failure: Mapping[str, Any]) -> str:
    found = f" <small>found: {text(failure['found'])}</small>" if failure.get("found") else ""
    return f"<b>{text(failure['router'])}</b> on {text(failure['task'])}: {text(failure['rule'])}{found}"


def _guard_group(board: Board, router: str, entries: Sequence[Mapping[str, Any]], unfolded: bool) -> str:
    ranked = sorted(entries, key=lambda entry: (entry["value"] - entry["base"], entry["task"]))
    items = "".join(f"<li>{_guard_entry(entry)}</li>" for entry in ranked)
    opened = " open" if unfolded or router == board.main else ""
    summary = f"base beats <em>{text(router)}</em> on {counted(len(entries), 'task')}"
    return f"<details{opened}><summary>{summary}</summary><ul>{items}</ul></details>"


def _guard_entry(entry: Mapping[str, Any]) -> str:
    name = text(entry["task"])
    if entry.get("verdict") == "behind":
        name = f"<b>{name}</b>"
    split = SPLITS.get(entry["split"], entry["split"])
    return f"{name} <small>{hundredths(entry['base'])} &gt; {hundredths(entry['value'])}, {text(split)}</small>"
