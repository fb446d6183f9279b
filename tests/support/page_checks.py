"""Whether everybody can use a page: axe-core where it is installed, and in any case a list of checks of our own.

axe-core is no part of this project: install it with npm, and give its `axe.min.js` in the environment variable
`LORARY_AXE`, or have `node_modules/axe-core` in this folder.
"""

import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

OWN_CHECKS = Path(__file__).with_suffix(".js")
AXE_RUN = """async () => (await axe.run(document, { resultTypes: ["violations"] })).violations
  .filter(({ impact }) => ["serious", "critical"].includes(impact))
  .map(({ id, help, nodes }) => `axe ${id}: ${help}: ${nodes.map(({ html }) => html.slice(0, 120)).join(" | ")}`)"""


def axe_script() -> str | None:
    """The text of axe-core, or None where it is not installed."""
    named = os.environ.get("LORARY_AXE")
    path = Path(named) if named else ROOT / "node_modules" / "axe-core" / "axe.min.js"
    return path.read_text(encoding="utf-8") if named or path.is_file() else None


def barriers(page: Any) -> list[str]:
    """What keeps some people from using a page as it stands now; empty where nothing does.

    Args:
        page: of Playwright.
    """
    found = list(page.evaluate(OWN_CHECKS.read_text(encoding="utf-8")))
    if (script := axe_script()) is not None:
        page.evaluate(script)
        found += page.evaluate(AXE_RUN)
    return found
