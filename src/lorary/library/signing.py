"""Signatures over a library by an elliptic-curve key, as model-signing of the OpenSSF writes and checks them.

Signed are library.json and all that lies in the folders of adapters. A signature needs no network. Nothing else of
Lorary knows model-signing, which an extra brings.
"""

import ast
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorary.errors import LibraryError, MissingExtraError, UsageError
from lorary.library.files import reported
from lorary.library.folders import change
from lorary.library.layout import ADAPTERS, LIBRARY_FILE, SIGNATURE
from lorary.library.problem import Problem
from lorary.reading import read_regular

# Where the password of a private key is read from.
PASSWORD = "LORARY_SIGNING_PASSWORD"
REMEDY = "ask whoever signed it, or sign it again if the change is yours: lorary library sign LIB --key FILE"
# How model-signing begins what it says of files.
_SAYS = {"Extra files": "not signed", "Missing files": "missing", "Hash mismatch": "changed"}


def sign_library(library: Path, key: str | Path) -> Path:
    """Sign a library as it is.

    Args:
        library: its folder, which must be whole.
        key: file of a private key (PEM; curve P-256, P-384 or P-521), its password in `LORARY_SIGNING_PASSWORD`.

    Returns:
        The file of the signature.

    Raises:
        UsageError: if the key cannot be used.
        LibraryError: if the library cannot be written.
        MissingExtraError: if model-signing is not installed.
    """
    signing = _package().signing
    password = os.environ.get(PASSWORD)
    with _key_reported(key, "a private key"):
        config = signing.Config().use_elliptic_key_signer(
            private_key=key, password=None if password is None else password.encode()
        )
    with change(library) as root, tempfile.TemporaryDirectory() as place:
        made = Path(place) / SIGNATURE
        try:
            config.set_hashing_config(_hashing(library)).sign(library, made)
        except ValueError as error:
            raise LibraryError(
                f"library {library} must be whole to be signed", found=error, remedy="lorary library verify LIB"
            ) from error
        root.replace(SIGNATURE, made.read_bytes(), f"{SIGNATURE}.new")
    return library / SIGNATURE


def verify_signature(library: Path, key: str | Path, signature: str | Path | None = None) -> list[Problem]:
    """Check a library against its signature.

    Args:
        library: its folder.
        key: file of the public key of whoever signed it (PEM).
        signature: file of the signature; the library's own where None.

    Returns:
        What is other than it was signed, by adapter; empty if all is well.

    Raises:
        UsageError: if the key cannot be used.
        MissingExtraError: if model-signing is not installed.
    """
    verifying = _package().verifying
    with _key_reported(key, "a public key"):
        config = verifying.Config().use_elliptic_key_verifier(public_key=key)
    path = library / SIGNATURE if signature is None else Path(signature)
    rule = f"{path} must be a signature of this library by the key of '{key}'"
    try:
        read_regular(path, follow_links=signature is not None)
    except OSError as error:
        return [Problem(SIGNATURE, rule, error.strerror or str(error), "lorary library sign LIB --key FILE")]
    try:
        with reported(library):
            config.set_hashing_config(_hashing(library)).verify(library, path)
    except LibraryError:
        raise
    except Exception as error:  # whatever somebody else's file makes of the packages beneath
        _, says, listed = str(error).partition("Signature mismatch: ")
        if says:
            return list(_by_name(ast.literal_eval(listed), library))
        return [Problem(SIGNATURE, rule, f"{type(error).__name__}: {error}"[:300], REMEDY)]
    return []


def _by_name(differences: Iterable[str], library: Path) -> Iterator[Problem]:
    """What model-signing says of files, as problems of adapters."""
    for difference in differences:
        finding = next(finding for start, finding in _SAYS.items() if difference.startswith(start))
        listed = difference.split("'")[1] if finding == "changed" else difference.partition("': ")[2]
        for path in listed.split(", "):
            place, _, rest = path.partition("/")
            part = rest.partition("/")[0] if place == ADAPTERS else path
            yield Problem(part, f"{library / path} must be as it was signed", finding, REMEDY)


def _hashing(library: Path) -> Any:
    """How model-signing hashes a library: the files that are signed, and no others."""
    package = _package()

    class Hashing(package.hashing.Config):  # type: ignore[name-defined]
        def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Any:
            return super().hash(model_path, files_to_hash=list(_signed(library)))

    return Hashing().set_ignored_paths(paths=(), ignore_git_paths=False)


def _signed(library: Path) -> Iterator[Path]:
    yield library / LIBRARY_FILE
    for folder, _, files in os.walk(library / ADAPTERS, followlinks=False):
        yield from (Path(folder, file) for file in sorted(files))


def _package() -> Any:
    try:
        import model_signing
    except ImportError as error:
        raise MissingExtraError(error.name or "model_signing", "signing") from error
    return model_signing


@contextmanager
def _key_reported(key: str | Path, kind: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of several packages, and of the file system
        raise UsageError(
            f"--key must be a file of {kind}, in PEM, of curve P-256, P-384 or P-521",
            found=f"{str(key)!a}: {error}"[:300],
            remedy=f"the password of a private key goes into the variable {PASSWORD}",
        ) from error
