"""Errors of other packages as they may be shown: without what could be a credential."""

import os
import re

_SECRET_NAME = re.compile("KEY|SECRET|TOKEN|PASSW|CREDENTIAL|SAS", re.IGNORECASE)
# A shorter value would take ordinary words out of messages.
LEAST_LENGTH = 8
_USER = re.compile(r"(://)[^/\s@]*@")
_QUERY = re.compile(r"(://[^\s?'\"<>]*)\?[^\s'\"<>]*")
_AUTHORIZATION = re.compile(r"(authorization\"?\s*[:=]\s*)(?:\w+ )?[^\s,;<>]+", re.IGNORECASE)
_HEADER = re.compile(r"(x-amz-[a-z-]*|signature|credential|token)(\"?\s*[:=]\s*)[^\s,;<>]+", re.IGNORECASE)
_TAG = re.compile(r"<(AWSAccessKeyId|StringToSign\w*|CanonicalRequest\w*|SignatureProvided)>.*?</\1>", re.DOTALL)
MOST = 300


def hide(text: str) -> str:
    """A text of another package in one line, without values of environment variables that are secrets, without users
    and queries of URLs, and without headers that authorise.

    >>> hide("GET https://me:pass@host/x?sig=abc failed")
    'GET https://host/x failed'
    """
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= LEAST_LENGTH:
            text = text.replace(value, "[hidden]")
    text = _TAG.sub(r"<\1>[hidden]</\1>", text)
    text = _QUERY.sub(r"\1", _USER.sub(r"\1", text))
    text = _AUTHORIZATION.sub(r"\1[hidden]", text)
    text = " ".join(_HEADER.sub(r"\1\2[hidden]", text).split())
    return text if len(text) <= MOST else text[:MOST] + "..."
