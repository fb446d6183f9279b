"""The clusters of a library: found, stored, found again, and shown."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lorary
from lorary.adapter import Adapter, LoraFactors
from lorary.errors import AdapterError, LibraryError, UsageError
from lorary.formats.peft_config import new_config
from lorary.library import clusters as recipe
from lorary.library.store import Library
from lorary.report.cluster_text import print_clusters
from lorary.report.clusters import map_of, render_map

PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
D = 32
CLOSE = {"a0": 0, "b0": 1, "a1": 0, "b1": 1, "a2": 0}


def adapter_of(name: str, direction: int, noise: float, rank: int = 2, zero: bool = False) -> Adapter:
    """An adapter near one of a few directions, in a gauge of its own."""
    generator = torch.Generator().manual_seed(100 + direction)
    own = torch.Generator().manual_seed(sum(map(ord, name)))
    modules = {}
    for path in PATHS:
        lora_a, lora_b = torch.randn(rank, D, generator=generator), torch.randn(D, rank, generator=generator)
        lora_b = lora_b + noise * torch.randn(D, rank, generator=own)
        gauge = torch.eye(rank) + 0.3 * torch.randn(rank, rank, generator=own)
        modules[path] = LoraFactors(gauge @ lora_a, lora_b @ torch.linalg.inv(gauge) * (not zero), 2.0)
    return Adapter(name, modules, new_config(None, rank=rank, alpha=2 * rank, target_modules=["q_proj"]))


@pytest.fixture
def library(tmp_path: Path, tiny_base_folder: Path) -> Library:
    """Three adapters near one direction and two near another, each of a known family."""
    library = Library.create(tmp_path / "lib", tiny_base_folder)
    for name, direction in CLOSE.items():
        library.add_adapter(adapter_of(name, direction, 0.2), {"tasks": [name], "families": {name: name[0]}})
    return library


def test_alike_adapters_share_a_cluster_whatever_their_gauge(library: Library) -> None:
    result = lorary.cluster(str(library.path), k=2)
    assert result.labels == {"a0": 0, "a1": 0, "a2": 0, "b0": 1, "b1": 1}
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert set(document) >= {
        "k",
        "assignments",
        "cohesion",
        "silhouette",
        "zero",
        "duplicates",
        "nearest",
        "candidates",
    }
    assert (document["k"], document["assignments"], document["is_stored"]) == (2, result.labels, False)
    assert document["agreement"] == {"adjusted_rand": 1.0, "mutual_information": pytest.approx(1.0)}
    assert all(0.8 < value < 1 for value in document["cohesion"])
    assert document["nearest"]["b0"][0][0] == "b1"


def test_a_second_call_answers_from_the_first_and_reads_no_weights(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = lorary.cluster(str(library.path), k=2)
    assert first.folder is not None
    assert re.fullmatch(r"clusters-[0-9a-f]+", first.folder.name)
    assert (first.folder / "clusters.json").is_file()
    monkeypatch.setattr(Library, "get", lambda *_: pytest.fail("an adapter was read"))
    second = lorary.cluster(str(library.path), k=2)
    assert second.is_stored
    assert second.cosine is not None
    assert first.cosine is not None
    assert torch.equal(first.cosine, second.cosine)
    assert second.to_json() == {**first.to_json(), "is_stored": True}


@pytest.mark.parametrize("change", ["adapter", "name", "k", "seed", "method", "edition"])
def test_another_adapter_or_setting_has_another_answer(
    library: Library, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"k": 2, "seed": 1, "method": "delta"}
    first = lorary.cluster(str(library.path), **settings)
    if change == "adapter":
        library.replace_adapter(adapter_of("a0", 0, 0.3), {"tasks": ["a0"]})
    elif change == "name":
        library.add_adapter(adapter_of("b2", 1, 0.2), {"tasks": ["b2"]})
    elif change == "edition":
        monkeypatch.setattr(recipe, "EDITION", recipe.EDITION + 1)
    else:
        settings |= {"k": {"k": 3}, "seed": {"seed": 2}, "method": {"method": "sketch"}}[change]
    second = lorary.cluster(str(library.path), **settings)
    assert not second.is_stored
    assert second.folder != first.folder


def test_provenance_that_changes_no_weights_keeps_the_answer(library: Library) -> None:
    lorary.cluster(str(library.path), k=2)
    library.replace_adapter(library.get("a0"), {"tasks": ["a0"], "families": {"a0": "b"}})
    result = lorary.cluster(str(library.path), k=2)
    assert result.is_stored
    assert result.families["a0"] == "b"


def test_zero_adapters_and_duplicates_are_told_apart(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    library.add_adapter(adapter_of("idle", 0, 0.0, zero=True), {"tasks": []})
    library.add_adapter(replace(library.get("b0"), name="copy"), {"tasks": []})
    result = lorary.cluster(str(library.path), k=2)
    document = result.to_json()
    assert document["zero"] == ["idle"]
    assert document["duplicates"] == [["b0", "copy"]] or document["duplicates"] == [["copy", "b0"]]
    assert document["assignments"]["idle"] == -1
    shown = map_of(result)
    assert "idle" not in shown.names
    assert "idle" in render_map(shown)
    print_clusters(result)
    printed = capsys.readouterr().out
    assert "zero adapters, in no cluster: idle" in printed
    assert "the same update:" in printed


def test_a_number_of_clusters_that_is_chosen_comes_with_what_was_tried(
    library: Library, capsys: pytest.CaptureFixture[str]
) -> None:
    result = lorary.cluster(str(library.path))
    assert result.document["k"] == 2
    assert result.document["candidates"][0]["k"] == 2
    print_clusters(result)
    printed = capsys.readouterr().out
    assert "2 clusters of 5 adapters" in printed
    assert "k chosen among, with silhouette and stability: 2 (" in printed
    assert f"stored in {result.folder}" in printed
    assert "agreement with families: adjusted Rand 1.00" in printed
    assert "How many clusters" in render_map(map_of(result))


def test_the_warning_of_different_draws_comes_back_with_the_stored_answer(library: Library) -> None:
    for _ in range(2):
        with pytest.warns(UserWarning, match="different initial draws"):
            lorary.cluster(str(library.path), k=2, method="paper-2024")


def test_a_library_that_cannot_be_written_gets_its_answer_with_a_warning(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise LibraryError("library lib must be writable", found="read-only")

    monkeypatch.setattr(recipe, "save_derived", refuse)
    with pytest.warns(UserWarning, match="not stored: library lib must be writable"):
        result = lorary.cluster(str(library.path), k=2)
    assert result.folder is None
    assert result.to_json()["folder"] is None


def test_what_cannot_be_clustered_is_refused(tmp_path: Path, tiny_base_folder: Path, library: Library) -> None:
    empty = Library.create(tmp_path / "empty", tiny_base_folder)
    for found in (0, 1):
        with pytest.raises(LibraryError, match=rf"at least two adapters[\s\S]*found: {found}"):
            lorary.cluster(str(empty.path))
        empty.add_adapter(adapter_of(f"zero{found}", 0, 0.0, zero=True), {"tasks": []})
    with pytest.raises(UsageError, match=r"between 1 and 5[\s\S]*found: 6"):
        lorary.cluster(str(library.path), k=6)
    with pytest.raises(UsageError, match=r"method[\s\S]*found: foo"):
        lorary.cluster(str(library.path), k=2, method="foo")
    assert not (library.path / "derived").exists()
    library.add_adapter(adapter_of("wide", 0, 0.1, rank=3), {"tasks": []})
    with pytest.raises(AdapterError, match="rank"):
        lorary.cluster(str(library.path), k=2, method="paper-2024")
    assert lorary.cluster(str(library.path), k=2).labels["wide"] >= 0


@pytest.mark.parametrize("k", [1, "auto"])
def test_a_library_of_zero_adapters_only_is_refused(tmp_path: Path, tiny_base_folder: Path, k: Any) -> None:
    library = Library.create(tmp_path / "idle", tiny_base_folder)
    for name in ("idle0", "idle1"):
        library.add_adapter(adapter_of(name, 0, 0.0, zero=True), {"tasks": []})
    with pytest.raises(UsageError, match="compute something"):
        lorary.cluster(str(library.path), k=k)


def test_a_damaged_answer_is_refused_by_name(library: Library) -> None:
    folder = lorary.cluster(str(library.path), k=2).folder
    assert folder is not None
    (folder / "clusters.json").write_text("{}")
    with pytest.raises(LibraryError, match=re.escape(folder.name)):
        lorary.cluster(str(library.path), k=2)


@pytest.mark.parametrize(
    ("families", "family"),
    [({"t": "x"}, "x"), ({"t": "x", "u": "x"}, "x"), ({"t": "x", "u": "y"}, None), ({"t": "none"}, None), ("x", None)],
)
def test_the_family_of_an_adapter_is_known_where_its_tasks_have_one(
    library: Library, families: object, family: str | None
) -> None:
    library.replace_adapter(library.get("a0"), {"tasks": [], "families": families})
    assert lorary.cluster(str(library.path), k=2).families.get("a0") == family


def test_adapters_of_one_family_or_none_agree_with_nothing(library: Library) -> None:
    for name in CLOSE:
        library.replace_adapter(library.get(name), {"tasks": []})
    assert lorary.cluster(str(library.path), k=2).to_json()["agreement"] is None


def test_the_page_shows_the_cohesion_of_the_document(library: Library) -> None:
    result = lorary.cluster(str(library.path), k=2)
    page = render_map(map_of(result))
    for value in result.document["cohesion"]:
        assert f"<b>{value:.2f}</b>" in page
