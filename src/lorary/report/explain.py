"""The page of an explanation: a strip of tokens, a map of layers and experts, and tables; it needs no plotly."""

from pathlib import Path

from lorary.evaluate.explanation import Explanation
from lorary.report.explain_map import map_data
from lorary.report.explain_sections import sections
from lorary.report.shell import page_html, write_page

SCRIPTS = ("core.js", "explain.js")


def write_explanation(path: Path, explanation: Explanation) -> None:
    """Write an explanation as one self-contained page, replacing an older one at once or not at all.

    Args:
        path: the file to write, in a folder that exists.
        explanation: what was seen.

    Raises:
        UsageError: if the file cannot be written.
    """
    write_page(path, render_explanation(explanation))


def render_explanation(explanation: Explanation) -> str:
    """The page as one string: tables that need no script, and a script that lets a reader choose a token."""
    facts = {
        "base model": explanation.base_model,
        "library": f"{explanation.library}, {len(explanation.experts)} experts",
        "router": _router(explanation),
        "prompt template": explanation.template,
    }
    if explanation.decides:
        facts["tokens"] = f"{explanation.shares.shape[1]} that count, in {len(explanation.layers)} layers"
    return page_html(
        f"Lorary: where tokens go in {explanation.library}",
        facts,
        sections(explanation),
        map_data(explanation) if explanation.decides else {},
        scripts=SCRIPTS if explanation.decides else (),
        styles=("style.css", "explain.css"),
        plots=False,
    )


def _router(explanation: Explanation) -> str:
    if not explanation.decides:
        return explanation.router
    shown = [f"{key} {value}" for key, value in explanation.settings.items() if key not in ("router", "experts")]
    return f"{explanation.router}, {', '.join(shown)}"
