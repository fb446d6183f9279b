"""Choosing and ordering adapters of a listing; tags, notes and names that people give them."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorary.adapter import Adapter, LoraFactors
from lorary.errors import LibraryError, MissingExtraError, NoSuchAdapterError, UsageError
from lorary.formats.peft_config import new_config
from lorary.library.assignment import Assignment, save_assignment
from lorary.library.catalogue import KEYS, select
from lorary.library.listing import list_library
from lorary.library.prepared import Prepared, expert_key, group_key, load_prepared, save_prepared
from lorary.library.store import Library

Q = "model.layers.0.self_attn.q_proj"
Names = Callable[..., list[str]]


def adapter_of(name: str, rank: int = 2) -> Adapter:
    factors = LoraFactors(torch.full((rank, 32), 0.5), torch.ones(32, rank), 2.0)
    return Adapter(name, {Q: factors}, new_config(None, rank=rank, alpha=2 * rank, target_modules=[Q]))


@pytest.fixture
def library(tmp_path: Path, tiny_base_folder: Path) -> Library:
    library = Library.create(tmp_path / "lib", tiny_base_folder)
    for name, rank, details in (
        ("first", 4, {"tasks": ["sst2"], "method": "private"}),
        ("second", 2, {"tasks": ["trec", "sst5"], "source": "hf://user/Second@0123"}),
        ("third", 16, {"tasks": []}),
    ):
        library.add_adapter(adapter_of(name, rank), details)
    return library


@pytest.fixture
def names(library: Library) -> Names:
    def chosen(**options: Any) -> list[str]:
        return [row["name"] for row in select(list_library(library.path)[0], **options)]

    return chosen


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["first", "second", "third"]),
        ({"is_reversed": True}, ["third", "second", "first"]),
        ({"sort": "rank"}, ["second", "first", "third"]),
        ({"sort": "size", "is_reversed": True}, ["third", "first", "second"]),
        ({"sort": "tasks"}, ["first", "second", "third"]),
        ({"sort": "origin", "is_reversed": True}, ["second", "first", "third"]),
        ({"filters": ["rank>=4"]}, ["first", "third"]),
        ({"filters": ["rank>=4", "rank <= 4"]}, ["first"]),
        ({"filters": ["parameters=128"]}, ["second"]),
        ({"filters": ["task=sst*"]}, ["first", "second"]),
        ({"filters": ["name=?????"]}, ["first", "third"]),
        ({"filters": ["target=q_proj"]}, ["first", "second", "third"]),
        ({"filters": ["target=v_proj"]}, []),
        ({"filters": ["origin=hf://user/*"]}, ["second"]),
        ({"filters": ["origin=built:*"]}, ["first"]),
        ({"filters": ["date>=2000"]}, ["first", "second", "third"]),
        ({"filters": ["changed<=2000-01-01"]}, []),
        ({"search": "SECOND"}, ["second"]),
        ({"search": "trec"}, ["second"]),
        ({"search": "self_attn"}, ["first", "second", "third"]),
        ({"tags": ["good"]}, []),
    ],
)
def test_adapters_are_chosen_and_ordered(names: Names, options: dict[str, Any], expected: list[str]) -> None:
    assert names(**options) == expected


def test_a_listing_has_every_key_that_it_can_be_ordered_by(library: Library, names: Names) -> None:
    assert set(list_library(library.path)[0][0]) == set(KEYS)
    assert all(sorted(names(sort=key)) == ["first", "second", "third"] for key in KEYS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filters": ["rank"]}, "KEY=PATTERN"),
        ({"filters": ["rank="]}, "KEY=PATTERN"),
        ({"filters": ["rank=large"]}, "number"),
        ({"filters": ["name>=a"]}, "name=PATTERN"),
        ({"filters": ["rnk=2"]}, "did you mean 'rank'"),
        ({"sort": "nothing"}, "they are name"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(names: Names, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        names(**options)


def test_tags_and_a_note_are_written_down_beside_unchanged_weights(library: Library, names: Names) -> None:
    before = library.provenance("first")
    assert library.tag("first", ["good", "team/search"]) == ["good", "team/search"]
    assert library.tag("first", ["v1.0"], ["good", "never-there"]) == ["team/search", "v1.0"]
    library.note("first", "for the demo\nonly")
    assert library.provenance("first") == {**before, "tags": ["team/search", "v1.0"], "note": "for the demo\nonly"}
    assert library.verify() == []
    assert names(tags=["v1.0"]) == names(search="the DEMO") == names(filters=["tag=team/*"]) == ["first"]
    library.tag("first", (), ["team/search", "v1.0"])
    library.note("first", "")
    assert library.provenance("first") == before


def test_nothing_is_written_where_nothing_changes(library: Library) -> None:
    library.tag("first", ["good"])
    before = library.stamps()
    library.tag("first", ["good"], ["bad"])
    assert library.stamps() == before


@pytest.mark.parametrize("tag", ["", "-x", "a b", "x" * 65, "a\n", "ü"])
def test_a_tag_that_cannot_be_one_is_refused(library: Library, tag: str) -> None:
    with pytest.raises(UsageError, match="a tag must be"):
        library.tag("first", [tag])


def test_what_is_not_there_gets_no_tag_note_or_name(library: Library) -> None:
    for act in (
        lambda: library.tag("firs", ["x"]),
        lambda: library.note("firs", ""),
        lambda: library.rename("firs", "x"),
    ):
        with pytest.raises(NoSuchAdapterError, match="did you mean 'first'"):
            act()
    with pytest.raises(UsageError, match="not both"):
        library.tag("first", ["x"], ["x"])
    with pytest.raises(UsageError, match="2,000 characters"):
        library.note("first", "x" * 2001)


def test_a_renamed_adapter_keeps_its_files_and_what_was_prepared_of_it(library: Library) -> None:
    tensors = {Q: torch.ones(3)}
    save_prepared(library, "centroids", expert_key(library, "first"), Prepared(tensors, {"rows": 3}, {}))
    save_prepared(library, "together", group_key(library, ["first", "second"]), Prepared(tensors, {}, {}))
    files = {path.name: path.read_bytes() for path in (library.path / "adapters" / "first").iterdir()}
    assert library.rename("first", "best") == (["centroids"], ["together"])
    assert library.names() == ["best", "second", "third"]
    assert {path.name: path.read_bytes() for path in (library.path / "adapters" / "best").iterdir()} == files
    prepared = load_prepared(library, "centroids", expert_key(library, "best"))
    assert prepared is not None
    assert torch.equal(prepared.tensors[Q], tensors[Q])
    assert prepared.made_of == {"rows": 3}
    assert load_prepared(library, "together", group_key(library, ["best", "second"])) is None
    assert library.verify() == []
    assert library.rename("best", "Best") == (["centroids"], [])
    assert library.names() == ["Best", "second", "third"]
    assert library.rename("second", "second") == ([], [])


def test_a_new_name_must_be_free_and_fit(library: Library) -> None:
    for new, kind, message in (
        ("second", LibraryError, "taken by 'second'"),
        ("Third", LibraryError, "taken by 'third'"),
        ("../out", UsageError, "name of an adapter"),
    ):
        with pytest.raises(kind, match=message):
            library.rename("first", new)
    assert library.names() == ["first", "second", "third"]


def test_an_adapter_that_something_names_keeps_its_name(library: Library) -> None:
    router = library.default_router
    library.set_default_router({**router, "experts": ["first"]})
    with pytest.raises(LibraryError, match="default router"):
        library.rename("first", "best")
    library.set_default_router(router)
    digest = library.provenance("first")["content_hash"]
    save_assignment(library, Assignment(("sst2",), {"first": digest}, {Q: torch.zeros(1, 1, 1)}), {})
    with pytest.raises(LibraryError, match="skill of an assignment"):
        library.rename("first", "best")
    with library.build_lock(), pytest.raises(LibraryError, match="one build at a time"):
        library.rename("second", "best")
    assert library.names() == ["first", "second", "third"]


def test_a_rename_that_fails_leaves_the_old_name(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    save_prepared(library, "centroids", expert_key(library, "first"), Prepared({Q: torch.ones(3)}, {}, {}))

    def fail(*_arguments: object, **_keywords: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("lorary.library.handles.os.rename", fail)
    with pytest.raises(LibraryError, match="Input/output"):
        library.rename("first", "best")
    monkeypatch.undo()
    assert library.names() == ["first", "second", "third"]
    assert load_prepared(library, "centroids", expert_key(library, "first")) is not None


def test_a_library_is_a_table_of_pandas(library: Library) -> None:
    library.tag("first", ["good"])
    table = library.to_pandas()
    assert list(table["name"]) == ["first", "second", "third"]
    assert set(table.columns) == set(KEYS)
    assert table["tags"][0] == ["good"]


def test_a_library_is_a_table_of_polars(library: Library) -> None:
    pytest.importorskip("polars")
    table = library.to_polars()
    assert table["name"].to_list() == ["first", "second", "third"]
    assert table["tasks"].to_list() == [["sst2"], ["trec", "sst5"], []]


@pytest.mark.parametrize("package", ["pandas", "polars"])
def test_a_package_for_tables_that_is_absent_is_named(
    library: Library, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"'{package}'.*\n?.*lorary\[tables\]"):
        getattr(library, f"to_{package}")()


def test_an_expert_shows_itself_as_a_table_without_markup_of_strangers(library: Library) -> None:
    library.note("second", "<b>bold</b>")
    shown = library["second"]._repr_html_()
    assert "&lt;b&gt;bold" in shown
    assert "hf://user/Second@0123" in shown
    assert "<b>" not in shown
