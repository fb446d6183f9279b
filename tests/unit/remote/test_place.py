"""URLs of remotes, and what is hidden of them."""

from pathlib import Path

import pytest

from lorary.errors import UsageError
from lorary.remote.hiding import hide
from lorary.remote.place import Place, parse_place

DIGEST = "0" * 64


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("s3://bucket/lib", Place("s3", "s3://bucket/lib")),
        ("S3://bucket/some/lib/@v1", Place("s3", "s3://bucket/some/lib", "v1")),
        (f"gs://bucket/lib@{DIGEST}", Place("gs", "gs://bucket/lib", DIGEST)),
        ("hf://user/lib@v1.0", Place("hf", "hf://user/lib", "v1.0")),
        ("file:///a/b@v1", Place("file", "/a/b", "v1")),
        ("file:///a%20b", Place("file", "/a b")),
        ("/a/b@v1", Place("file", "/a/b", "v1")),
        ("/a@b/c", Place("file", "/a@b/c")),
    ],
)
def test_a_url_is_taken_apart(url: str, place: Place) -> None:
    assert parse_place(url) == place


def test_a_folder_that_is_there_is_meant_whatever_is_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "a@b").mkdir()
    assert parse_place(str(tmp_path / "a@b")) == Place("file", str(tmp_path / "a@b"))


@pytest.mark.parametrize(
    "url",
    ["s3://key:hunter22@bucket/lib", "s3://hunter22@bucket/lib", "https://host/lib?sig=hunter22", "s3://b/l#hunter22",
     "hf://user:hunter22@name/lib", "file://me:hunter22@host/lib"],
)  # fmt: skip
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UsageError, match="must hold no credentials") as error:
        parse_place(url)
    assert "hunter22" not in str(error.value)


@pytest.mark.parametrize("url", ["", "s3://", "hf://user", "hf://a/b/c", "s3://b/../c", "s3://b/l@-x", "a\0b"])
def test_what_is_no_place_is_refused(url: str) -> None:
    with pytest.raises(UsageError):
        parse_place(url)


def test_secrets_of_the_environment_and_of_urls_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abcdefgh/1234")
    monkeypatch.setenv("SOME_KEY", "a")
    text = "PUT http://u:p@h/x?X-Amz-Signature=123 \nAuthorization: Bearer zzzz; abcdefgh/1234"
    text += " <StringToSign>q</StringToSign>"
    shown = hide(text)
    for secret in ("u:p", "123", "zzzz", "abcdefgh", ">q<"):
        assert secret not in shown
    assert "PUT http://h/x" in shown
    assert "\n" not in shown
