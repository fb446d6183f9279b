"""What a browser makes of a page. Without Chromium, tests that look are left out by name."""

import shutil
import subprocess
from pathlib import Path

import pytest
from pages import Page

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="only Chromium draws a page")


def drawn(path: Path) -> str:
    """The page as HTML after its script ran, which must complain of nothing and draw every plot.

    Args:
        path: of the page; beside it lies the browser's profile.
    """
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
               f"--user-data-dir={path.parent / 'profile'}", "--enable-logging=stderr", "--window-size=1280,900",
               "--virtual-time-budget=3000", "--dump-dom", path.absolute().as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    places = done.stdout.split('id="plot-')[1:]
    assert [place.partition('"')[0] for place in places if "<svg" not in place] == []
    numbers = [value for tag, attrs in Page(done.stdout).elements if tag in ("path", "text", "rect", "image", "svg")
               for key in ("d", "transform", "x", "width", "height") if (value := attrs.get(key))]  # fmt: skip
    assert [value for value in numbers if "NaN" in value or "Infinity" in value or "undefined" in value] == []
    return done.stdout
