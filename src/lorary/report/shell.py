"""The page around its sections: head, style, data, scripts, and a policy that lets it load nothing."""

import os
from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any

from lorary.errors import MissingExtraError, UsageError
from lorary.library.files import replace_file
from lorary.report.asset import asset
from lorary.report.markup import script_json, text

NOSCRIPT = '<noscript><p class="guard">The plots need JavaScript; the tables do not.</p></noscript>'


def page_html(
    title: str,
    facts: Mapping[str, str],
    sections: Sequence[tuple[str, str, str]],
    data: Mapping[str, Any],
    *,
    scripts: Sequence[str],
    styles: Sequence[str] = ("style.css",),
    plots: bool = True,
) -> str:
    """One self-contained page.

    A page with plots carries its own plotting library. A content security policy in its head lets it load nothing and
    run nothing but the two scripts written here, so no text of a task or a prompt can do either.

    Args:
        title: the heading, plain text.
        facts: label and value of what stands under the heading, plain text.
        sections: identifier, title and HTML of each section.
        data: what the scripts draw, values of JSON.
        scripts: assets to run, in order.
        styles: assets with styles, in order.
        plots: whether scripts draw with plotly; a page without is small, and its HTML says all of it.

    Returns:
        The HTML.

    Raises:
        MissingExtraError: if there are plots, and plotly is not installed.
    """
    plotly = _plotly_script() if plots else ""
    script = "".join(asset(name) for name in scripts)
    return Template(asset("page.html")).substitute(
        policy=_policy(plotly, script),
        title=text(title),
        style="".join(asset(name) for name in styles),
        facts="".join(f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in facts.items()),
        links="".join(f'<a href="#{key}">{name}</a>' for key, name, _ in sections),
        note=NOSCRIPT if plots else "",
        sections="\n".join(f'<section id="{key}"><h2>{name}</h2>{html}</section>' for key, name, html in sections),
        data=script_json(data),
        plotly=plotly,
        script=script,
    )


def write_page(path: Path, page: str) -> None:
    """Write a page, or a table of CSV or Markdown, replacing an older one at once or not at all.

    Args:
        path: the file to write, in a folder that exists.
        page: its text.

    Raises:
        UsageError: if the file cannot be written.
    """
    # A lone surrogate has no UTF-8 form; as a character reference it shows as the replacement character.
    encoded = page.encode("utf-8", errors="xmlcharrefreplace")
    try:
        replace_file(path, encoded, path.with_name(f".{path.name}.{os.getpid()}.tmp"))
    except OSError as error:
        raise _unwritable(path, error.strerror) from error


def check_report(path: Path) -> None:
    """Refuse a page that could not be written, before the work for it is done.

    Args:
        path: the file that will be written.

    Raises:
        MissingExtraError: if plotly is not installed.
        UsageError: if the path is a folder, or its own folder does not exist.
    """
    if find_spec("plotly") is None:
        raise MissingExtraError("plotly", "viz")
    check_writable(path)


def check_writable(path: Path) -> None:
    """Refuse a page without plots that could not be written, as `check_report` does one with plots.

    Args:
        path: the file that will be written.

    Raises:
        UsageError: if the path is a folder, or its own folder does not exist or may not be written to.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise _unwritable(path, "a folder" if path.is_dir() else "no such folder")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise _unwritable(path, "its folder is closed to you")


def _unwritable(path: Path, found: str | None) -> UsageError:
    return UsageError(
        f"the report must be writable at '{path}'", found=found, remedy="name a file in a folder that exists"
    )


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
