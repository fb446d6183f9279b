"""Where a remote library lies: a URL of a scheme, a root and a ref, without credentials."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lorary.errors import UsageError

MAIN = "main"
REF = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
EXAMPLES = "for example s3://bucket/lib, hf://user/lib@v1 or a folder"


@dataclass(frozen=True)
class Place:
    """A remote library and one of its refs.

    Args:
        scheme: `file`, `s3`, `hf`, ...
        root: what all its refs share, as it is written down: a URL, or the absolute path of a folder.
        ref: `main`, which moves; the name of a snapshot, or its digest, which never do.
    """

    scheme: str
    root: str
    ref: str = MAIN

    @property
    def url(self) -> str:
        """The place as a user writes it."""
        return self.root if self.ref == MAIN else f"{self.root}@{self.ref}"

    @property
    def name(self) -> str:
        """The last part of the root: what a copy is called."""
        return re.sub(r"[^A-Za-z0-9._-]", "-", self.root.rstrip("/").rpartition("/")[2]).lstrip(".-") or "library"

    @property
    def is_digest(self) -> bool:
        """Whether the ref is the digest of a snapshot; on the Hub, that of a commit."""
        digits = 40 if self.scheme == "hf" else 64
        return re.fullmatch(f"[0-9a-f]{{{digits}}}", self.ref) is not None


def parse_place(url: str) -> Place:
    """The place that a URL or a path names.

    Args:
        url: `s3://bucket/lib`, `gs://`, `az://`, `hf://user/lib`, `file:///path`, a path, or a URL of another scheme
            that fsspec reads. `@REF` behind it names a ref other than `main`.

    Raises:
        UsageError: if it holds credentials, which are not repeated in the message, or is no place.
    """
    if "\0" in url or not url.strip():
        raise UsageError("the URL of a remote library must name a place", found=ascii(url[:200]), remedy=EXAMPLES)
    scheme = _SCHEME.match(url)
    if scheme is None:
        return _folder(url.removeprefix("file:"))
    kind = scheme[1].lower()
    try:
        parts = urlsplit(url)
        has_secret = bool(parts.username or parts.password or "@" in parts.netloc or parts.query or parts.fragment)
    except ValueError:
        raise UsageError("the URL of a remote library must be one", found=f"{kind}://...", remedy=EXAMPLES) from None
    if has_secret:
        raise UsageError(
            "the URL of a remote library must hold no credentials, and no query",
            found=f"{kind}://... with a user, a password or a query, not shown here",
            remedy="give credentials by environment variables of that provider; write @REF behind a path",
        )
    if kind == "file":
        return _folder(unquote(parts.netloc + parts.path))
    root, ref = _split(url)
    root = f"{kind}://{root[scheme.end() :].strip('/')}"
    if kind == "hf" and not _HUB_NAME.fullmatch(root.removeprefix("hf://")):
        raise UsageError("a library on the Hub must be hf://USER/NAME", found=url[:200], remedy=EXAMPLES)
    if root == f"{kind}://" or ".." in root.split("/"):
        raise UsageError("the URL of a remote library must name a place", found=url[:200], remedy=EXAMPLES)
    return Place(kind, root, ref)


def _folder(path: str) -> Place:
    root, ref = (path, MAIN) if os.path.isdir(path) else _split(path)
    return Place("file", str(Path(root).expanduser().absolute()), ref)


def _split(url: str) -> tuple[str, str]:
    """What comes before the ref, and the ref."""
    root, at, ref = url.rpartition("@")
    if not at or "/" in ref:
        return url, MAIN
    if not REF.fullmatch(ref):
        raise UsageError(
            "a ref must be 1 to 100 letters, digits, dots, dashes and underscores",
            found=ascii(ref[:200]),
            remedy="for example @v1",
        )
    return root, ref
