"""The page around its sections: templates, style, data, scripts, and a policy that lets it load nothing."""

import os
from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from lorary.errors import UsageError
from lorary.library.files import replace_file
from lorary.report.markup import cosine, counted, enumerated, hundredths, percent, script_json, signed, signed_nats
from lorary.terminal import printable

# Identifier, title and HTML.
Section = tuple[str, str, Markup]


def asset(name: str) -> str:
    """The text of a template, style or script."""
    return (files("lorary.report") / "assets" / name).read_text(encoding="utf-8")


@cache
def _templates() -> Environment:
    """The templates: every value is escaped, and a name that is missing is an error."""
    templates = Environment(
        loader=FunctionLoader(asset),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (cosine, counted, enumerated, hundredths, percent, signed, signed_nats)
    templates.filters |= {function.__name__: function for function in filters}
    return templates


def part(template: str, macro: str, *values: Any) -> Markup:
    """A part of a page.

    Args:
        template: the asset that holds it.
        macro: its name there.
        values: what the macro is given.
    """
    return Markup(getattr(_templates().get_template(template).module, macro)(*values))


def page_html(
    title: str,
    facts: Mapping[str, str],
    sections: Sequence[Section],
    data: Mapping[str, Any],
    *,
    scripts: Sequence[str],
    styles: Sequence[str] = ("style.css",),
    plots: bool = True,
    may_ask: bool = False,
) -> str:
    """One self-contained page.

    A content security policy in its head lets it load nothing and run nothing but the one script written here, so no
    text of a task or a prompt can do either.

    Args:
        title: the heading, plain text.
        facts: label and value of the lines under the heading, plain text.
        sections: in the order in which they are read; the titles are plain text.
        data: what the scripts draw, values of JSON.
        scripts: assets to run, in order.
        styles: assets with styles, in order.
        plots: whether scripts draw; the HTML of a page without plots says all of it.
        may_ask: whether scripts may ask the server that the page came from.

    Returns:
        The HTML.
    """
    script = "".join(asset(name) for name in scripts)
    return (
        _templates()
        .get_template("page.html")
        .render(
            policy=Markup(_policy(script, may_ask=may_ask)),
            title=title,
            style=Markup("".join(asset(name) for name in styles)),
            facts=facts,
            sections=sections,
            data=Markup(script_json(data)),
            plots=plots,
            script=Markup(script),
        )
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


def check_writable(path: Path) -> None:
    """Refuse a file that could not be written, before the work for it is done.

    Raises:
        UsageError: if the path is a folder, or its own folder does not exist or may not be written to.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise _unwritable(path, "a folder" if path.is_dir() else "no such folder")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise _unwritable(path, "its folder is closed to you")


def _unwritable(path: Path, finding: str | None) -> UsageError:
    return UsageError(
        f"the report must be writable at '{path}'", found=finding, remedy="name a file in a folder that exists"
    )


def _policy(script: str, *, may_ask: bool) -> str:
    """Nothing may be loaded; this script may run; styles and pictures may be made on the page itself."""
    digest = b64encode(sha256(script.encode("utf-8")).digest()).decode("ascii")
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"
    # A form of such a page is for its script alone.
    return f"{policy}; connect-src 'self'; base-uri 'none'; form-action 'none'" if may_ask else policy
