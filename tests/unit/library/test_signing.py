"""Signatures: whoever changes a signed library is found out, by the name of the adapter."""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from lorary.adapter import Adapter
from lorary.errors import LibraryError, MissingExtraError, UsageError
from lorary.library.store import Library

MakeAdapter = Callable[..., Adapter]
needs_extra = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("model_signing", "OpenSSL")),
    reason="the extra `signing` is not installed: pip install 'lorary[signing]'",
)
# Of packages beneath model-signing.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def keys(folder: Path, name: str, password: bytes | None = None) -> tuple[Path, Path]:
    """Files of a private key and of its public one."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    lock = serialization.NoEncryption() if password is None else serialization.BestAvailableEncryption(password)
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock))
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))
    return private, public


@needs_extra
def test_a_signed_library_that_changes_is_reported_by_name(
    library: Library, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    private, public = keys(tmp_path, "mine")
    for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0)):
        library.add_adapter(make_adapter(name, value), {})
    assert [problem.adapter for problem in library.verify(key=public)] == ["model.sig"]
    assert library.sign(private) == library.path / "model.sig"
    library.snapshot()  # what else lies in the folder is not signed
    (library.path / "results").mkdir()
    assert library.verify(key=public) == []
    library.replace_adapter(make_adapter("a", 9.0), {})
    library.remove("b")
    library.add_adapter(make_adapter("d", 4.0), {})
    library.set_default_router({**library.default_router, "top_k": 1})
    assert library.verify() == []  # it is whole, but not what was signed
    problems = library.verify(key=public)
    assert {(problem.adapter, problem.found) for problem in problems} == {
        ("a", "changed"), ("b", "missing"), ("d", "not signed"), ("library.json", "changed"),
    }  # fmt: skip
    assert any("adapters/b/adapter_model.safetensors must be as it was signed" in problem.rule for problem in problems)
    library.sign(private)
    assert library.verify(key=public) == []


@needs_extra
def test_a_key_of_somebody_else_or_a_damaged_signature_proves_nothing(
    library: Library, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    library.add_adapter(make_adapter("a", 1.0), {})
    private, public = keys(tmp_path, "mine")
    _, other = keys(tmp_path, "other")
    signature = library.sign(private)
    (problem,) = library.verify(key=other)
    assert (problem.adapter, "Key mismatch" in problem.found) == ("model.sig", True)
    kept = tmp_path / "kept.sig"
    kept.write_bytes(signature.read_bytes())
    for damage in (b"", b"{", b"[]", signature.read_bytes().replace(b'"payload":"', b'"payload":"AAAA')):
        signature.write_bytes(damage)
        assert [problem.adapter for problem in library.verify(key=public)] == ["model.sig"], damage[:20]
    assert library.verify(key=public, signature=kept) == []


@needs_extra
def test_a_key_that_cannot_be_used_is_named(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = keys(tmp_path, "locked", b"open sesame")
    for key in (tmp_path / "none.pem", public, private):
        with pytest.raises(UsageError, match=r"(?s)--key must be a file of a private key.*LORARY_SIGNING_PASSWORD"):
            library.sign(key)
    with pytest.raises(UsageError, match="--key must be a file of a public key"):
        library.verify(key=private)
    with pytest.raises(UsageError, match="must be checked by a key"):
        library.verify(signature="x")
    monkeypatch.setenv("LORARY_SIGNING_PASSWORD", "open sesame")
    library.sign(private)
    assert library.verify(key=public) == []


@needs_extra
def test_a_damaged_library_is_not_signed(library: Library, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    library.add_adapter(make_adapter("a", 1.0), {})
    (library.path / "adapters" / "a" / "provenance.json").unlink()
    with pytest.raises(LibraryError, match="must be whole to be signed"):
        library.sign(keys(tmp_path, "mine")[0])


def test_without_the_extra_its_name_is_told(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(MissingExtraError, match=r"lorary\[signing\]"):
        library.sign("key.pem")
    with pytest.raises(MissingExtraError, match=r"lorary\[signing\]"):
        library.verify(key="key.pub")
