"""The report: one HTML page that opens anywhere, offline, and asks nothing of any network."""

from pathlib import Path
from typing import Any

from lorary.evaluate.routed_prompt import RoutedPrompt
from lorary.report.contents import Report, Similarity
from lorary.report.evidence_plots import gap_plot, heat_plot, routing_shares, sweeps
from lorary.report.plots import OTHER, family_colours, loss_plot, score_plot, similarity_plot
from lorary.report.sections import sections
from lorary.report.shell import check_report, page_html, write_page
from lorary.report.table_model import Board
from lorary.report.traces import routing_plot

__all__ = ["Report", "RoutedPrompt", "Similarity", "check_report", "write_report"]

SCRIPTS = (
    "core.js", "scores.js", "heat.js", "gap.js", "sweep.js", "similarity.js", "losses.js", "routing_map.js",
    "routing.js", "start.js", "listen.js",
)  # fmt: skip
# Colours in style.css, `--hue-0` and so on.
NUM_HUES = 8


def write_report(path: Path, report: Report) -> None:
    """Write a report as one self-contained page, replacing an older one at once or not at all.

    Args:
        path: the file to write, in a folder that exists.
        report: the contents.

    Raises:
        MissingExtraError: if plotly is not installed.
        UsageError: if the file cannot be written.
    """
    write_page(path, render_report(report))


def render_report(report: Report) -> str:
    """The page as one string.

    Raises:
        MissingExtraError: if plotly is not installed.
    """
    board = Board(report.evaluation) if report.evaluation else None
    known = [*report.families().values(), *(str(cell["family"]) for cell in report.cells), OTHER]
    colours = family_colours([family for family in known if family != OTHER], NUM_HUES) | {OTHER: NUM_HUES - 1}
    return page_html(
        report.title,
        report.facts,
        sections(report, board, colours),
        _plot_data(report, board, colours),
        scripts=SCRIPTS,
    )


def _plot_data(report: Report, board: Board | None, colours: dict[str, int]) -> dict[str, Any]:
    families = report.families()
    similarity = report.similarity
    return {
        "colours": colours,
        "families": families,
        "scores": score_plot(board) if board and board.primary else None,
        "heat": heat_plot(board) if board and board.primary else None,
        "gap": gap_plot(board) if board else [],
        "accuracy": routing_shares(board) if board else None,
        "sweeps": sweeps(board) if board else [],
        "similarity": similarity_plot(similarity) if similarity and similarity.names else None,
        "routings": [routing_plot(routed) for routed in report.routings],
        "losses": loss_plot(report.losses, families),
    }
