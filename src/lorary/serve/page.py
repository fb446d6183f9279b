"""A page of ours as a response: nothing but what stands in it may run."""

import base64
import hashlib
import re

from starlette.responses import HTMLResponse

_SCRIPT = re.compile(r"<script\b([^>]*)>(.*?)</script>", re.DOTALL | re.IGNORECASE)


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
