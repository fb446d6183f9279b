"""Push, pull and clone over a repository of the Hub, by a stand-in of its HTTP interface."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub, fake_hub

import lorary
from lorary.adapter import Adapter
from lorary.errors import LibraryError
from lorary.library.store import Library
from lorary.recipes.push import run_push
from lorary.remote.card import MARK
from lorary.remote.clone import clone_library
from lorary.remote.pull import pull_library

MakeLibrary = Callable[..., Library]
MakeAdapter = Callable[..., Adapter]
URL = "hf://user/lib"
TOKEN = "hf_token_of_a_test"
# huggingface_hub 2.4 uploads a large file without Xet in a way that its HTTP client is about to give up.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    from huggingface_hub import close_session, constants

    with fake_hub(TOKEN) as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template)
        monkeypatch.setattr("lorary.remote.store.FIRST_WAIT_S", 0.0)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        close_session()
        yield hub
        close_session()


def test_a_library_goes_in_one_commit_as_plain_adapters_with_a_card(
    hub: FakeHub, make_library: MakeLibrary, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    library = make_library("lib", a=1.0, b=2.0)
    first = run_push(str(library.path), URL)
    repository = hub.repositories["user/lib"]
    assert (repository.is_private, len(repository.commits)) == (True, 2)
    files = repository.commits[first.snapshot]
    for path in (library.path / "adapters").rglob("*.*"):
        assert files[str(path.relative_to(library.path))] == path.read_bytes()
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: lorary\n")
    assert "| a | 2 | 128 | a |" in card
    assert clone_library(URL, tmp_path / "copy").received == ["a", "b"]
    assert Library.open(tmp_path / "copy").verify() == []

    library.replace_adapter(make_adapter("b", 3.0), {"tasks": ["b"]})
    library.remove("a")
    uploads = len(hub.uploads)
    second = run_push(str(library.path))
    assert (second.sent, second.removed, len(hub.uploads)) == (["b"], ["a"], uploads + 1)
    assert repository.messages[-1] == "Adapters: 1 changed, 1 removed"
    assert not any(path.startswith("adapters/a/") for path in repository.commits[second.snapshot])
    commits = len(repository.commits)
    assert run_push(str(library.path)).snapshot == second.snapshot
    assert len(repository.commits) == commits
    pulled = pull_library(tmp_path / "copy")
    assert (pulled.received, pulled.removed) == (["b"], ["a"])


def test_a_push_that_another_overtakes_joins_with_it(hub: FakeHub, make_library: MakeLibrary, tmp_path: Path) -> None:
    library, other = make_library("lib", a=1.0), make_library("other", b=2.0)
    run_push(str(make_library("first", c=3.0).path), URL)
    hub.before_commit.append(lambda: run_push(str(other.path), URL))
    run_push(str(library.path), URL)
    clone_library(URL, tmp_path / "copy")
    assert Library.open(tmp_path / "copy").names() == ["a", "b", "c"]


def test_a_push_that_broke_off_sends_no_large_file_twice(
    hub: FakeHub, make_library: MakeLibrary, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_push(str(make_library("first").path), URL)
    library, repository = make_library("lib", a=1.0, b=2.0, c=3.0), hub.repositories["user/lib"]
    before = len(repository.commits)
    hub.commit_failures.append(400)
    with pytest.raises(LibraryError, match="must do what is asked of it"):
        run_push(str(library.path), URL)
    assert (len(repository.commits), len(hub.uploads)) == (before, 3)
    run_push(str(library.path), URL)
    assert (len(repository.commits), len(hub.uploads)) == (before + 1, 3)
    assert clone_library(URL, tmp_path / "copy").received == ["a", "b", "c"]


def test_a_tag_names_one_commit_and_opens(
    hub: FakeHub, make_library: MakeLibrary, make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORARY_CACHE", str(tmp_path / "cache"))
    library = make_library("lib", a=1.0)
    first = run_push(str(library.path), f"{URL}@v1", public=True)
    assert not hub.repositories["user/lib"].is_private
    library.add_adapter(make_adapter("b"), {"tasks": []})
    with pytest.raises(LibraryError, match="already"):
        run_push(str(library.path), f"{URL}@v1")
    run_push(str(library.path), URL)
    assert lorary.Library.open(f"{URL}@v1").names() == ["a"]
    assert lorary.Library.open(URL).names() == ["a", "b"]
    asked = len(hub.requests)
    assert lorary.Library.open(f"{URL}@{first.snapshot}").names() == ["a"]
    assert len(hub.requests) == asked, "a commit that is here needs no request"


def test_a_card_that_somebody_wrote_stays(hub: FakeHub, make_library: MakeLibrary, make_adapter: MakeAdapter) -> None:
    library = make_library("lib", a=1.0)
    run_push(str(library.path), URL)
    repository = hub.repositories["user/lib"]
    own = repository.commits[repository.main]["README.md"].replace(MARK.encode(), b"Mine.")
    repository.commits[repository.main]["README.md"] = own
    library.add_adapter(make_adapter("b"), {"tasks": []})
    run_push(str(library.path))
    assert repository.commits[repository.main]["README.md"] == own


def test_failures_are_repeated_or_said_without_the_token(
    hub: FakeHub, make_library: MakeLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = make_library("lib", a=1.0)
    run_push(str(library.path), URL)
    hub.failures.extend([503, 500])
    assert clone_library(URL, tmp_path / "copy").received == ["a"]
    with pytest.raises(LibraryError, match="none of that name"):
        clone_library("hf://user/none", tmp_path / "none")
    hub.failures.append(403)
    with pytest.raises(LibraryError, match="HF_TOKEN") as error:
        clone_library(URL, tmp_path / "again")
    assert TOKEN not in str(error.value)
    monkeypatch.setenv("HF_TOKEN", "hf_another_token")
    with pytest.raises(LibraryError) as error:
        clone_library(URL, tmp_path / "again")
    assert "hf_another_token" not in str(error.value)


def test_a_repository_without_a_library_is_said(hub: FakeHub, make_library: MakeLibrary, tmp_path: Path) -> None:
    run_push(str(make_library("lib", a=1.0).path), URL)
    del hub.repositories["user/lib"].commits[hub.repositories["user/lib"].main]["lorary.json"]
    with pytest.raises(LibraryError, match="must hold a library"):
        clone_library(URL, tmp_path / "copy")
