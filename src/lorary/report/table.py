"""The table of tasks and routers, once with the tasks' own metrics and once with losses."""

from collections.abc import Mapping
from itertools import groupby

from lorary.evaluate.metrics import METRIC_MEANINGS, METRIC_NAMES
from lorary.report.markup import MISSING, counted, hundredths, text
from lorary.report.table_model import BASE, SPLITS, Board, Cell, Mean, TaskLine, is_told

SPLIT_NOTES = {
    "held_in": "an expert was trained on each of them",
    "held_out": "no expert has seen them",
    "mixed": "trained on for one library and not for another",
}
# A difference to the base that is shaded in full: half of the scale, or half of the base's own loss.
FULL_SHADE = 0.5


def score_table(board: Board, colours: Mapping[str, int], *, losses: bool) -> str:
    """Tasks by split and family, one column per router.

    Args:
        board: the evaluation.
        colours: number of each family's colour.
        losses: show losses in nats instead of primary values.

    Returns:
        An HTML table.
    """
    heads = "".join(f'<th scope="col"{_edge(router)}>{text(router)}</th>' for router in board.routers)
    body = "".join(_split_body(board, split, colours, losses) for split in board.splits)
    kind = "losses" if losses else "scores"
    return (
        f'<table class="results {kind}"><thead><tr><th scope="col" class="family">family</th>'
        f'<th scope="col" class="task">task</th>{heads}</tr></thead>{body}</table>'
    )


def metric_notes(board: Board) -> str:
    """What the metrics of this table mean, as HTML list items."""
    metrics = sorted({line.metric for line in board.tasks if line.metric in METRIC_MEANINGS})
    items = [f"<li><b>{METRIC_NAMES[metric]}</b>: {METRIC_MEANINGS[metric]}.</li>" for metric in metrics]
    return "".join([*items, "<li><b>loss</b>: nats per token of the reference answer; lower is better.</li>"])


def _edge(router: str) -> str:
    return ' class="apart"' if is_told(router) else ""


def _split_body(board: Board, split: str, colours: Mapping[str, int], losses: bool) -> str:
    lines = board.lines(split)
    width = len(board.routers) + 2
    title = f"<b>{SPLITS[split].capitalize()}</b> · {counted(len(lines), 'task')} · {SPLIT_NOTES[split]}"
    rows = [f'<tr class="split"><th scope="rowgroup" colspan="{width}"><span>{title}</span></th></tr>']
    for family, group in groupby(lines, key=lambda line: line.family):
        members = list(group)
        hue = f"hue-{colours[family]}"
        label = f'<th scope="rowgroup" rowspan="{len(members)}" class="family {hue}">{text(family)}</th>'
        for i, line in enumerate(members):
            start = ' class="starts"' if i == 0 else ""
            rows.append(
                f"<tr{start}>{label if i == 0 else ''}{_task_head(line, hue)}{_cells(board, line, losses)}</tr>"
            )
    means = [(board.mean_loss if losses else board.mean)(router, split) for router in board.routers]
    counts = sorted({mean.tasks for mean in means if mean} - {len(lines)})
    # Where a router failed, the mean of each is over fewer tasks than stand above it.
    note = f"<small>over {' or '.join(map(str, counts))} of them</small>" if counts else ""
    cells = "".join(_mean_cell(mean, router, losses) for mean, router in zip(means, board.routers, strict=True))
    rows.append(f'<tr class="mean"><th class="family"></th><th scope="row" class="task">mean{note}</th>{cells}</tr>')
    return f"<tbody>{''.join(rows)}</tbody>"


def _task_head(line: TaskLine, hue: str) -> str:
    metric = text(METRIC_NAMES.get(line.metric, line.metric))
    note = f'<span class="narrow">{text(line.family)} · </span>{metric} · {counted(line.rows, "row")}'
    return f'<th scope="row" class="task {hue}">{text(line.name)}<small>{note}</small></th>'


def _cells(board: Board, line: TaskLine, losses: bool) -> str:
    source = board.losses if losses else board.primary
    row = {router: source[router, line.name] for router in board.routers if (router, line.name) in source}
    rivals = {cell["value"] for router, cell in row.items() if not is_told(router)}
    # Where all score alike, nothing is best.
    best = (min(rivals) if losses else max(rivals)) if len(rivals) > 1 else None
    return "".join(_cell(board, row, router, best, losses) for router in board.routers)


def _cell(board: Board, row: Mapping[str, Cell], router: str, best: float | None, losses: bool) -> str:
    cell = row.get(router)
    if cell is None:
        return f"<td{_edge(router)}>{MISSING}</td>"
    classes = ["apart"] if is_told(router) else []
    if not is_told(router) and cell["value"] == best:
        classes.append("best")
    gain = _gain(row.get(BASE), cell, losses) if router != BASE else 0.0
    if abs(gain) >= 0.005:
        classes.append("up" if gain > 0 else "down")
    shade = f' style="--d:{min(1.0, abs(gain) / FULL_SHADE):.2f}"' if gain else ""
    tag = f'<span class="tag">{text(cell["template"])}</span>' if router == BASE else ""
    value, low, high = (_number(cell[key], losses, key) for key in ("value", "low", "high"))
    return (
        f'<td class="{" ".join(classes)}"{shade} title="{_tooltip(board, cell, losses)}"><b>{value}</b>{tag}'
        f"<small>{low}–{high}</small></td>"
    )


def _gain(base: Cell | None, cell: Cell, losses: bool) -> float:
    """What a cell gains over the base: points of 1, or for losses the share of the base's loss that is gone."""
    if base is None:
        return 0.0
    return (base["value"] - cell["value"]) / max(base["value"], 1e-6) if losses else cell["value"] - base["value"]


def _tooltip(board: Board, cell: Cell, losses: bool) -> str:
    parts = [f"{cell['router']} on {cell['task']}", f"{cell['template']} template", counted(cell["n"], "row")]
    other = board.others.get((cell["router"], cell["task"]))
    if other and not losses:
        parts.append(f"{other['template']} template: {hundredths(other['value'])}")
    if cell.get("expert"):
        parts.append(f"expert {cell['expert']}")
    return text(", ".join(parts))


def _number(value: float, losses: bool, key: str) -> str:
    if losses:
        return f"{value:.2f}"
    return hundredths(value, 1 if key == "value" else 0)


def _mean_cell(mean: Mean | None, router: str, losses: bool) -> str:
    if mean is None:
        return f"<td{_edge(router)}>{MISSING}</td>"
    value, low, high = (_number(getattr(mean, key), losses, key) for key in ("value", "low", "high"))
    return f"<td{_edge(router)}><b>{value}</b><small>{low}–{high}</small></td>"
