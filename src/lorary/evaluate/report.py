"""The report: one HTML page that opens anywhere, offline, and asks nothing of any network."""

import os
from base64 import b64encode
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any

from lorary.errors import MissingExtraError, UsageError
from lorary.evaluate.page.assets import asset
from lorary.evaluate.page.board import Board
from lorary.evaluate.page.contents import Report, RoutedPrompt, Similarity
from lorary.evaluate.page.markup import script_json, text
from lorary.evaluate.page.plots import OTHER, family_colours, loss_plot, score_plot, similarity_plot
from lorary.evaluate.page.sections import sections
from lorary.evaluate.page.traces import routing_plot
from lorary.library.files import replace_file

__all__ = ["Report", "RoutedPrompt", "Similarity", "check_report", "write_report"]

SCRIPTS = ("core.js", "scores.js", "similarity.js", "losses.js", "routing_map.js", "routing.js", "start.js")
# Colours in style.css, `--hue-0` and so on.
NUM_HUES = 8


def write_report(path: Path, report: Report) -> None:
    """Write a report as one self-contained page, replacing an older one at once or not at all.

    The page carries its own plotting library. A content security policy in its head lets it load nothing and run
    nothing but the two scripts written here, so no text of a task or a prompt can do either.

    Args:
        path: the file to write, in a folder that exists.
        report: the contents.

    Raises:
        MissingExtraError: if plotly is not installed.
        UsageError: if the file cannot be written.
    """
    # A lone surrogate has no UTF-8 form; as a character reference it shows as the replacement character.
    page = render_report(report).encode("utf-8", errors="xmlcharrefreplace")
    try:
        replace_file(path, page, path.with_name(f".{path.name}.{os.getpid()}.tmp"))
    except OSError as error:
        raise UsageError(
            f"the report must be writable at '{path}'",
            found=error.strerror,
            remedy="name a file in a folder that exists",
        ) from error


def check_report(path: Path) -> None:
    """Refuse a page that could not be written, before the work for it is done.

    Args:
        path: the file that `write_report` will write.

    Raises:
        MissingExtraError: if plotly is not installed.
        UsageError: if the path is a folder, or its own folder does not exist.
    """
    if find_spec("plotly") is None:
        raise MissingExtraError("plotly", "viz")
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(
            f"the report must be writable at '{path}'",
            found="a folder" if path.is_dir() else "no such folder",
            remedy="name a file in a folder that exists",
        )


def render_report(report: Report) -> str:
    """The page as one string.

    Raises:
        MissingExtraError: if plotly is not installed.
    """
    plotly = _plotly_script()
    script = "".join(asset(name) for name in SCRIPTS)
    board = Board(report.evaluation) if report.evaluation else None
    known = [*report.families().values(), *(str(cell["family"]) for cell in report.cells), OTHER]
    colours = family_colours([family for family in known if family != OTHER], NUM_HUES) | {OTHER: NUM_HUES - 1}
    parts = sections(report, board, colours)
    return Template(asset("page.html")).substitute(
        policy=_policy(plotly, script),
        title=text(report.title),
        style=asset("style.css"),
        facts="".join(f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in report.facts.items()),
        links="".join(f'<a href="#{key}">{title}</a>' for key, title, _ in parts),
        sections="\n".join(f'<section id="{key}"><h2>{title}</h2>{html}</section>' for key, title, html in parts),
        data=script_json(_plot_data(report, board, colours)),
        plotly=plotly,
        script=script,
    )


def _plot_data(report: Report, board: Board | None, colours: dict[str, int]) -> dict[str, Any]:
    families = report.families()
    similarity = report.similarity
    return {
        "colours": colours,
        "families": families,
        "scores": score_plot(board) if board and board.primary else None,
        "similarity": similarity_plot(similarity) if similarity and similarity.names else None,
        "routings": [routing_plot(routed) for routed in report.routings],
        "losses": loss_plot(report.losses, families),
    }


def _plotly_script() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingExtraError("plotly", "viz") from error
    # A browser hashes what it parsed, and parsing turns every kind of line end into this one.
    return str(get_plotlyjs()).replace("\r\n", "\n").replace("\r", "\n")


def _policy(*scripts: str) -> str:
    """Nothing may be loaded; these scripts may run; styles and pictures may be made on the page itself."""
    hashes = [b64encode(sha256(script.encode("utf-8")).digest()).decode("ascii") for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
