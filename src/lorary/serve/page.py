"""The page of the server: made anew when an adapter changes, and nothing but what stands in it may run."""

import base64
import hashlib
import re
import threading
from collections.abc import Callable

from starlette.responses import HTMLResponse

from lorary.library.store import Library

_SCRIPT = re.compile(r"<script\b([^>]*)>(.*?)</script>", re.DOTALL | re.IGNORECASE)


class Page:
    """A page that takes time to make.

    Args:
        library: that it shows.
        make: makes it.
    """

    def __init__(self, library: Library, make: Callable[[], str]) -> None:
        self._library, self._make = library, make
        self._lock = threading.Lock()
        self._stamps: object = None
        self._html = ""

    def response(self) -> HTMLResponse:
        """The page as of now; those who ask while it is made wait for it."""
        with self._lock:
            stamps = self._library.stamps()
            if stamps != self._stamps:
                self._html, self._stamps = self._make(), stamps
            return page_response(self._html)


def page_response(html: str) -> HTMLResponse:
    """A page with the policy that its own scripts run, and no others.

    Args:
        html: a whole page that asks nobody but its own server for anything.
    """
    hashes = [base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for _, body in _SCRIPT.findall(html)]
    scripts = " ".join(f"'sha256-{digest}'" for digest in dict.fromkeys(hashes)) or "'none'"
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src 'self' data:; font-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return HTMLResponse(html, headers={"content-security-policy": policy})
