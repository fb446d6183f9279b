"""Adapters of the Hub that are added to a library, by a stand-in of its HTTP interface."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub, Repository, fake_hub

from lorary.adapter import Adapter
from lorary.errors import AdapterError, LibraryError, UsageError
from lorary.formats.peft import encode_adapter, parse_adapter
from lorary.formats.peft_files import read_files
from lorary.library.nearest import Duplicate
from lorary.library.store import Library
from lorary.recipes.add import run_add
from lorary.remote.hub_adapters import HubAdapter, hub_adapters

MakeAdapter = Callable[..., Adapter]
MakeLibrary = Callable[..., Library]
PATH = "model.layers.0.self_attn.q_proj"
TOKEN = "hf_token_of_a_test"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    from huggingface_hub import close_session, constants

    with fake_hub(TOKEN) as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template)
        monkeypatch.setattr("lorary.remote.store.FIRST_WAIT_S", 0.0)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        close_session()
        yield hub
        close_session()


def put(hub: FakeHub, repo: str, adapters: dict[str, Adapter], *, base: str = "", **files: bytes) -> str:
    """A repository with adapters by folder, the root as an empty text; its commit."""
    content = {name.replace("__", "."): data for name, data in files.items()}
    for folder, adapter in adapters.items():
        content |= {f"{folder}/{file}".lstrip("/"): data for file, data in encode_adapter(adapter).items()}
    repository = hub.repositories.setdefault(repo, Repository())
    repository.filters = [f"base_model:adapter:{base}"]
    return repository.commit(content, "files")


def test_an_adapter_goes_in_with_the_commit_that_it_came_from(
    hub: FakeHub, make_library: MakeLibrary, make_adapter: MakeAdapter
) -> None:
    library = make_library("lib", a=1.0)
    first = put(hub, "user/sst", {"": make_adapter("sst", 2.0)})
    put(hub, "user/sst", {"": make_adapter("sst", 3.0), "checkpoint-5": make_adapter("c", 4.0)})
    hub.repositories["user/sst"].tags["v1"] = first
    assert run_add(str(library.path), ["hf://user/sst@v1"]).added == ["sst"]
    assert library.provenance("sst")["source"] == f"hf://user/sst@{first}"
    assert library.get("sst").modules.keys() == library.get("a").modules.keys()
    assert float(next(iter(library.get("sst").modules.values())).lora_a[0, 0]) == 2.0
    assert library["sst"].folder.joinpath("adapter_model.safetensors").is_file()
    assert not library["sst"].folder.joinpath("adapter_model.safetensors").is_symlink()
    latest = run_add(str(library.path), ["hf://user/sst"], name="latest")
    assert (latest.added, float(next(iter(library.get("latest").modules.values())).lora_a[0, 0])) == (["latest"], 3.0)
    assert run_add(str(library.path), ["hf://user/sst/checkpoint-5@main"]).added == ["checkpoint-5"]
    assert library.verify() == []


def test_a_repository_of_several_gives_each_with_its_records(
    hub: FakeHub, make_library: MakeLibrary, make_adapter: MakeAdapter
) -> None:
    other = make_library("other", x=2.0, y=3.0)
    files = {str(path.relative_to(other.path)): path.read_bytes() for path in other.path.rglob("*") if path.is_file()}
    commit = hub.repositories.setdefault("user/lib", Repository()).commit(files, "a library")
    library = make_library("lib", a=1.0)
    assert run_add(str(library.path), ["hf://user/lib"]).added == ["x", "y"]
    assert library.provenance("x")["tasks"] == ["x"]
    assert library.provenance("x")["source"] == f"hf://user/lib/adapters/x@{commit}"


def test_a_collection_gives_its_models_and_names_what_is_none(
    hub: FakeHub, make_library: MakeLibrary, make_adapter: MakeAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    put(hub, "user/one", {"": make_adapter("one", 2.0)})
    put(hub, "other/two", {"": make_adapter("two", 3.0)})
    put(hub, "user/pickled", {}, adapter_config__json=b"{}", adapter_model__bin=b"")
    put(hub, "user/mttl", {}, sst2__ckpt=b"", sst2__meta=b"")
    put(hub, "user/text", {}, README__md=b"")
    hub.collections["user/loras-0123"] = [
        ("model", "user/one"), ("dataset", "user/data"), ("model", "other/two"), ("model", "user/pickled"),
        ("model", "user/mttl"), ("model", "user/text"), ("model", "user/gone"),
    ]  # fmt: skip
    library = make_library("lib", a=1.0)
    result = run_add(str(library.path), ["hf://collections/user/loras-0123"])
    assert (result.added, library.names()) == (["one", "two"], ["a", "one", "two"])
    assert [failed.path.partition("@")[0] for failed in result.failed] == [
        f"hf://user/{repo}" for repo in ("pickled", "mttl", "text", "gone")
    ]
    said = " ".join(capsys.readouterr().err.split())
    reasons = ("never opened", "mttl", "no adapter_config.json", "nothing that you may see")
    for failed, reason in zip(result.failed, reasons, strict=True):
        assert reason in str(failed.found)
        assert f"not added: {failed.path}" in said
    assert TOKEN not in said


def test_a_users_adapters_of_this_base_are_found_over_several_pages(
    hub: FakeHub, make_library: MakeLibrary, make_adapter: MakeAdapter, tmp_path: Path, tiny_base_folder: Path
) -> None:
    for number, name in enumerate(("p", "q", "r")):
        put(hub, f"ann/{name}", {"": make_adapter(name, number + 2.0)}, base="org/base")
    put(hub, "ann/s", {"": make_adapter("s", 9.0)}, base="org/other")
    put(hub, "bob/t", {"": make_adapter("t", 9.0)}, base="org/base")
    unnamed = make_library("lib", a=1.0)
    with pytest.raises(UsageError, match="must have a Hub id"):
        run_add(str(unnamed.path), ["hf://ann"])
    library = Library.create(tmp_path / "named", tiny_base_folder, base_name="org/base")
    assert run_add(str(library.path), ["hf://ann"]).added == ["p", "q", "r"]
    with pytest.raises(LibraryError, match="adapters that name the base model org/base"):
        run_add(str(library.path), ["hf://carl"])


def test_a_check_says_what_would_happen_and_writes_nothing(
    hub: FakeHub, make_library: MakeLibrary, make_adapter: MakeAdapter
) -> None:
    put(hub, "user/same", {"": make_adapter("same", 1.0)})
    put(hub, "user/a", {"": make_adapter("a", 2.0)})
    library = make_library("lib", a=1.0)
    before = {path: path.stat().st_mtime_ns for path in (library.path / "adapters").rglob("*")}
    result = run_add(str(library.path), ["hf://user/same", "hf://user/a"], check_only=True)
    assert [(each.name, each.rank, each.num_parameters) for each in result.checked] == [("same", 2, 128)]
    assert result.duplicates == [Duplicate("same", "a", 1.0, is_same=True)]
    assert "'a' is taken by 'a'" in str(result.failed[0].found)
    assert {path: path.stat().st_mtime_ns for path in (library.path / "adapters").rglob("*")} == before


def test_an_adapter_that_changed_at_the_hub_keeps_the_commit_it_was_asked_for(
    hub: FakeHub, make_library: MakeLibrary, make_adapter: MakeAdapter
) -> None:
    first = put(hub, "user/sst", {"": make_adapter("sst", 2.0)})
    adapter = next(iter(hub_adapters("hf://user/sst", "org/base")))[1]
    put(hub, "user/sst", {"": make_adapter("sst", 3.0)})
    assert isinstance(adapter, HubAdapter)
    assert (adapter.commit, adapter.fetch().name) == (first, first)
    assert parse_adapter("sst", read_files(adapter.fetch(), "sst")).modules[PATH].lora_a[0, 0] == 2.0
    hub.repositories.clear()
    assert adapter.fetch().is_dir()  # it is in the cache


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("hf://", "URL of theirs"),
        ("hf://user/../x", "URL of theirs"),
        ("hf://user/a b", "URL of theirs"),
        ("hf://user/a@", "URL of theirs"),
        ("hf://user/a@../x", "URL of theirs"),
        ("hf://collections/user", "collections/USER/SLUG"),
        ("hf://user@v1", "revision belongs"),
        ("hf://collections/user/slug@v1", "revision belongs"),
    ],
)
def test_a_url_that_is_none_is_refused(url: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        list(hub_adapters(url, "org/base"))


def test_what_the_hub_does_not_have_is_said_and_what_failed_is_repeated(
    hub: FakeHub, make_library: MakeLibrary, make_adapter: MakeAdapter
) -> None:
    library = make_library("lib", a=1.0)
    put(hub, "user/sst", {"": make_adapter("sst", 2.0)})
    for url, message in (
        ("hf://user/none", "must be on the Hub"),
        ("hf://user/sst@v9", "must be on the Hub"),
        ("hf://collections/user/none", "404"),
    ):
        with pytest.raises(LibraryError, match=message):
            run_add(str(library.path), [url])
    with pytest.raises(AdapterError, match="must be a folder with"):
        run_add(str(library.path), ["hf://user/sst/nowhere"])
    hub.collections["user/empty-0"] = [("dataset", "user/data")]
    with pytest.raises(LibraryError, match="none of them a model"):
        run_add(str(library.path), ["hf://collections/user/empty-0"])
    hub.failures = [503, 500]
    assert run_add(str(library.path), ["hf://user/sst"]).added == ["sst"]
