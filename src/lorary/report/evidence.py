"""The sections of an evaluation that say why a router does as it does: gap, routing, sweeps."""

from lorary.report.evidence_plots import gap_plot, sweeps
from lorary.report.markup import counted, enumerated, hundredths, signed, text
from lorary.report.table_model import SPLITS, Board


def evaluation_sections(board: Board) -> list[tuple[str, str, str]]:
    """Identifier, title and HTML of each section that the evaluation has something for."""
    found = []
    if board.gaps:
        found.append(("gap", "From the base to the oracle", _gap(board)))
    if board.routing:
        found.append(("accuracy", "Routing to the right expert", _routing(board)))
    swept = sweeps(board)
    if swept:
        found.append(("sweeps", "One setting varied", _sweeps(len(swept))))
    return found


def _gap(board: Board) -> str:
    """The plot, and by name what has no gap to close."""
    none = [gap for gap in board.gaps if gap["closed"] is None]
    said = dict.fromkeys(
        f"on {SPLITS[gap['split']]} tasks ({signed(gap['gap'])} points over {counted(gap['tasks'], 'task')})"
        for gap in none
    )
    without = f"<p>No clear gap to close {enumerated(list(said))}.</p>" if said else ""
    plot = '<div class="plot" id="plot-gap" role="img" aria-label="Gap closed by router"></div>'
    return (
        '<p class="note">Gap closed: how far a router comes from the base (0) to the oracle (100), which is the one '
        "expert chosen by the task's name, and which a mixture may pass. Bars are 95 % intervals over rows. It is "
        "shown only where the oracle is clearly better than the base: the interval of their difference lies above 0."
        f"</p>{without}{plot if gap_plot(board) else ''}"
    )


def _routing(board: Board) -> str:
    shares = {mean["router"]: mean["share"] for mean in board.routing_means if mean["family"] is None}
    best = max(shares, key=lambda router: shares[router])
    chance = sorted({round(one["chance"], 4) for one in board.routing})
    said = enumerated([f"{hundredths(value)} %" for value in chance[:3]])
    return (
        f"<p><em>{text(best)}</em> gives the expert of the task the most: <strong>{hundredths(shares[best])} %"
        f"</strong> of the routing weight; chance gives {said}.</p>"
        '<p class="note">Share of the routing weight that the task\'s own expert gets, over prompt tokens and layers, '
        "and how often it is the strongest; for held-in tasks and routers that choose. Bars reach from the lowest to "
        "the highest task of the family; dotted lines are chance. A router may be good without being right: experts "
        "of related tasks help too.</p>"
        '<div class="plot" id="plot-accuracy" role="img" aria-label="Share of the right expert by family"></div>'
    )


def _sweeps(count: int) -> str:
    plots = "".join(
        f'<div class="plot" id="plot-sweep-{i}" role="img" aria-label="Means over one setting of a router"></div>'
        for i in range(count)
    )
    return (
        '<p class="note">Means over tasks with 95 % intervals over rows. Dashed: the oracle, dotted: the base, each in '
        f"the colour of its line.</p>{plots}"
    )
