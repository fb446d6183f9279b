"""The sections of the page as HTML, in the order in which they are read; empty ones are left out."""

from collections.abc import Mapping
from statistics import median

from lorary.report.asset import asset
from lorary.report.contents import Report, Similarity
from lorary.report.evidence import evaluation_sections
from lorary.report.headline import failure_box, guard_box, headline
from lorary.report.markup import counted, enumerated, text
from lorary.report.plots import closest_pairs, within_and_between
from lorary.report.table import metric_notes, score_table
from lorary.report.table_model import Board, is_told

# A longer table scrolls under its heading.
NUM_PLAIN_ROWS = 40


def sections(report: Report, board: Board | None, colours: Mapping[str, int]) -> list[tuple[str, str, str]]:
    """All sections that the report has something for.

    Args:
        report: the contents.
        board: its evaluation, arranged, if it has one.
        colours: number of each family's colour.

    Returns:
        Identifier, title and HTML of each.
    """
    found = []
    if board is not None and not board.primary and board.failures:
        found.append(("result", "Result", failure_box(board)))
    if board is not None and board.primary:
        found.append(("result", "Result", headline(board) + failure_box(board) + guard_box(board)))
        found.append(("table", "Every task", _table(board, colours)))
        found.append(("heat", "Heat map", _heat()))
        found.append(("families", "By family", _dots()))
        found += evaluation_sections(board)
    if report.similarity is not None and report.similarity.names:
        found.append(("similarity", "How alike the experts are", _similarity(report.similarity)))
    if report.routings:
        found.append(("routing", "Where the tokens go", asset("routing.html")))
    if report.losses:
        found.append(("losses", "Validation losses", _losses(report.losses)))
    return [*found, ("reading", "How to read this page", _reading(report, board))]


def _table(board: Board, colours: Mapping[str, int]) -> str:
    tables = score_table(board, colours, losses=False)
    choice = ""
    if board.losses:
        tables += score_table(board, colours, losses=True)
        choice = (
            '<input type="radio" name="shown" id="show-scores" checked><label for="show-scores">scores</label>'
            '<input type="radio" name="shown" id="show-losses"><label for="show-losses">losses</label>'
        )
    scroll = "scroll tall" if len(board.tasks) > NUM_PLAIN_ROWS else "scroll"
    oracle = " <i>oracle</i> is told which expert a task needs, so it competes with nobody." * any(
        is_told(router) for router in board.routers
    )
    return (
        f'<p class="note">Scores in points of 100, with their 95 % intervals. <span class="key up">Blue</span> is '
        'better than the base, <span class="key down">orange</span> is worse. The best column of a row is marked '
        f"★ where not all are alike.{oracle} "
        "The base is scored in the experts' template and in its own chat template; the better one stands here, "
        f'by name.</p><div class="switch">{choice}<div class="{scroll}" tabindex="0" role="region" '
        f'aria-label="Every task">{tables}</div></div><ul class="note">{metric_notes(board)}</ul>'
    )


def _heat() -> str:
    return (
        '<p class="note">The same values, coloured by the points that they lie above or below the base; a line parts '
        "the splits.</p>"
        '<div class="plot scroll" id="plot-heat" role="img" aria-label="Tasks and routers, coloured by the gain over '
        'the base; the table has the same numbers"></div>'
    )


def _dots() -> str:
    return (
        '<p class="note">Mean over the tasks of a family, in points of 100. The bars are 95 % intervals over rows: '
        "they tell how far these tasks are measured, not how other tasks of the family would do.</p>"
        '<div class="plot" id="plot-scores" role="img" aria-label="Means by family and router; the table has the '
        'same numbers task by task"></div>'
    )


def _similarity(similarity: Similarity) -> str:
    inside, across = within_and_between(similarity)
    said = [f"<strong>{value:.2f}</strong> {where}" for value, where in
            ((inside, "inside a family"), (across, "between families")) if value is not None]  # fmt: skip
    lead = f"<p>Two experts have a mean cosine of {enumerated(said)}.</p>" if said else ""
    pairs = "".join(
        f"<li><span>{text(a)} · {text(b)}</span><b>{value:.2f}</b></li>" for a, b, value in closest_pairs(similarity)
    )
    beside = f'<div class="beside"><h3>Closest pairs</h3><ol class="pairs">{pairs}</ol></div>' if pairs else ""
    return (
        f'{lead}<p class="note">Cosine between the whole updates of two experts, ordered by family; the diagonal, 1 by '
        "definition, is left blank. The colours reach as far as the values do.</p>"
        '<div class="pair"><div class="plot" id="plot-similarity" role="img" aria-label="Heat map of the cosine '
        f'between {counted(len(similarity.names), "expert")}"></div>{beside}</div>'
    )


def _losses(losses: Mapping[str, tuple[float, float]]) -> str:
    better = [base - own for base, own in losses.values() if own < base]
    worse = sorted(name for name, (base, own) in losses.items() if own >= base)
    lead = f"{len(better)} of {counted(len(losses), 'expert')} have a lower validation loss than the base"
    gain = f", the median by {median(better):.2f} nats per token" if better else ""
    names = f" Not: {enumerated([text(name) for name in worse])}." if worse else ""
    return (
        f'<p>{lead}{gain}.{names}</p><div class="plot" id="plot-losses" role="img" aria-label="Validation loss of the '
        'base and of each expert"></div>'
    )


def _reading(report: Report, board: Board | None) -> str:
    versions = ", ".join(f"{text(package)} {text(version)}" for package, version in report.versions.items())
    terms = asset("reading.html") if board is not None or report.routings else ""
    return terms + (f'<p class="note">Made with {versions}.</p>' if versions else "")
