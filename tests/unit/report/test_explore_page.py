"""The page of a library as text: what it gathers from the folder, and that no text of it can become code."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import Page
from tests.support.explored import make_explored

from lorary.adapter import Adapter, LoraFactors
from lorary.errors import AdapterError, LibraryError
from lorary.evaluate.cache import RESULTS_FILE
from lorary.formats.peft_config import new_config
from lorary.library.clusters import cluster_library
from lorary.library.derived import save_derived
from lorary.library.layout import RESULTS
from lorary.library.store import Library
from lorary.report.explore import explore_page, render_explored, size_words
from lorary.report.explore_contents import cluster_names, explored
from lorary.report.explore_map import LEAST_TSNE, map_points

ATTACK = "</script><img src=x onerror=alert(1)>\"'&<!--\u2028"
PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")


def adapter_of(name: str, direction: int, size: float = 1.0) -> Adapter:
    """An adapter near one of a few directions."""
    common, own = (torch.Generator().manual_seed(seed) for seed in (direction, 100 + sum(map(ord, name))))
    modules = {
        path: LoraFactors(
            torch.randn(2, 32, generator=common),
            size * (torch.randn(32, 2, generator=common) + 0.3 * torch.randn(32, 2, generator=own)),
            2.0,
        )
        for path in PATHS
    }
    return Adapter(name, modules, new_config(None, rank=2, alpha=4, target_modules=["q_proj"]))


@pytest.fixture
def library(tmp_path: Path, tiny_base_folder: Path) -> Library:
    """Four adapters near two directions."""
    library = Library.create(tmp_path / "lib", tiny_base_folder)
    for i, name in enumerate(("a0", "a1", "b0", "b1")):
        families = {name: "letters"} if i < 2 else {}
        metrics = {"val_loss": 0.5 + i, "val_loss_base": 2.0, "train_losses": [1.0] * 50}
        library.add_adapter(
            adapter_of(name, i // 2), {"tasks": [name], "families": families, "metrics": metrics, "seed": 3}
        )
    return library


def data_of(page: str) -> dict:
    return json.loads(Page(page).scripts[0])


def test_a_card_has_all_that_is_recorded(library: Library) -> None:
    card = data_of(explore_page(library))["adapters"][0]
    facts = dict(card["facts"])
    assert (card["name"], card["tasks"], card["families"]) == ("a0", ["a0"], ["letters"])
    assert (facts["rank"], facts["alpha"], facts["parameters"]) == ("2", "4", "256")
    assert card["hash"] == library.provenance("a0")["content_hash"]
    weights = library.path / "adapters" / "a0" / "adapter_model.safetensors"
    assert facts["size"] == size_words(weights.stat().st_size)
    assert facts["added"].endswith("UTC")
    assert card["losses"] == [2.0, 0.5]
    texts = data_of(explore_page(library))["texts"]
    provenance = {label: texts[place] for label, place in card["provenance"]}
    assert provenance["seed"] == "3"
    assert "train losses 50 values" in provenance["metrics"]


def test_neighbours_and_clusters_are_those_of_the_library(library: Library) -> None:
    found = cluster_library(library, k=2)
    data = data_of(explore_page(library))
    assert data["labels"] == found.document["labels"]
    for name, card in zip(library.names(), data["adapters"], strict=True):
        expected = [(library.names().index(other), round(c, 3)) for other, c in found.document["nearest"][name]]
        assert [tuple(pair) for pair in card["nearest"]] == expected
    assert len(data["points"]) == 4
    assert data["clusters"][data["labels"][0]] == "letters"
    assert data["clusters"][data["labels"][2]].startswith("around b")


def test_the_stored_clusters_are_taken_and_those_of_other_adapters_are_not(library: Library) -> None:
    cluster_library(library, k=3)
    assert len(set(data_of(explore_page(library))["labels"])) == 3
    cluster_library(library, k="auto")
    assert len(set(data_of(explore_page(library))["labels"])) == 2
    library.add_adapter(adapter_of("c0", 2), {})
    assert len(data_of(explore_page(library))["labels"]) == 5


def test_a_map_that_takes_long_is_stored_and_a_damaged_one_is_named(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorary.report.explore_map.LEAST_TSNE", 4)
    points = data_of(explore_page(library))["points"]
    (entry,) = (library.path / "derived").glob("map-*")

    def refuse(*_: object) -> None:
        raise AssertionError("the map was made anew")

    with monkeypatch.context() as patch:
        patch.setattr("lorary.report.explore_map.map_points", refuse)
        assert data_of(explore_page(library))["points"] == points
    folder = library.path / "derived"
    for number, wrong in enumerate(([[0.0, 0.0]], [[9.0, 0.0]] * 4, "x")):
        key = json.loads((entry / "entry.json").read_text())["key"]
        save_derived(library.path, "map", key, {"map.json": json.dumps({"points": wrong}).encode()})
        with pytest.raises(LibraryError, match="a point for each adapter"):
            explore_page(library)
        assert len(list(folder.glob("map-*"))) == 1, number


def test_a_library_that_cannot_be_written_has_its_map_all_the_same(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise LibraryError("it must be writable", found="read only")

    cluster_library(library, k=2)
    monkeypatch.setattr("lorary.report.explore_map.LEAST_TSNE", 4)
    monkeypatch.setattr("lorary.report.explore_map.save_derived", refuse)
    assert len(data_of(explore_page(library))["points"]) == 4
    assert not list((library.path / "derived").glob("map-*"))


def test_results_of_single_experts_are_shown_beside_the_base(library: Library) -> None:
    def cell(router: str, value: float, **changes: object) -> dict:
        cell = {"router": router, "task": "a0", "metric": "em", "primary": True, "value": value, "n": 20}
        return {**cell, **changes}

    lines = [
        [cell("base", 0.25), cell("base", 3.5, metric="loss", primary=False)],
        [cell("oracle", 0.5)],
        [cell("experts[b0]", 0.375)],
        [cell("experts[b0]", float("inf")), cell("experts[b1]", True), cell("experts[b1]", 0.5, n="many"), "cell"],
        [cell("oracle", 0.75)],  # the last one counts
        [cell("arrow", 1.0), cell("oracle", 1.0, task="of nobody")],
        {"a0": 3.0},
    ]
    folder = library.path / RESULTS
    folder.mkdir()
    written = [json.dumps({"key": str(i), "value": value}) for i, value in enumerate(lines)]
    (folder / RESULTS_FILE).write_text("\n".join([*written, '{"key": ["x"], "value": []}', '{"key": "cut']) + "\n")
    cards = data_of(explore_page(library))["adapters"]
    scores = {card["name"]: card["scores"] for card in cards}
    assert scores == {"a0": [["a0", "em", 0.75, 0.25, 20]], "a1": [], "b0": [["a0", "em", 0.375, 0.25, 20]], "b1": []}


@pytest.mark.parametrize("number", [0, 1])
def test_a_library_of_too_few_adapters_has_a_page_without_a_map(
    tmp_path: Path, tiny_base_folder: Path, number: int
) -> None:
    library = Library.create(tmp_path / "lib", tiny_base_folder)
    for i in range(number):
        library.add_adapter(adapter_of(f"a{i}", i), {})
    page = explore_page(library)
    assert "A map needs two adapters." in Page(page).text
    assert data_of(page)["points"] is None


def test_a_library_of_too_many_adapters_has_a_page_without_a_map(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorary.report.explore_contents.MOST_MAPPED", 3)
    page = explore_page(library)
    assert "A map shows at most 3 adapters." in Page(page).text
    assert [card["name"] for card in data_of(page)["adapters"]] == ["a0", "a1", "b0", "b1"]


@pytest.mark.parametrize("size", [0.0, 1.0])
def test_adapters_that_compute_nothing_or_the_same_have_a_page(
    tmp_path: Path, tiny_base_folder: Path, size: float
) -> None:
    library = Library.create(tmp_path / "lib", tiny_base_folder)
    one = adapter_of("same", 0, size)
    for name in ("a", "b", "c"):
        library.add_adapter(replace(one, name=name), {})
    data = data_of(explore_page(library))
    assert data["labels"] == ([-1] * 3 if size == 0 else [0] * 3)


def test_records_that_anybody_may_have_written_do_not_break_the_page(tmp_path: Path, tiny_base_folder: Path) -> None:
    library = Library.create(tmp_path / "lib", tiny_base_folder)
    strange = {"families": ["x"], "metrics": {"val_loss": 10**400, "val_loss_base": "low"}, "deep": [[[["x"]]]],
               "long": "x" * 10_000, **{f"key{i}": i for i in range(100)}}  # fmt: skip
    library.add_adapter(adapter_of("a", 0), strange)
    library.add_adapter(adapter_of("b", 1), {})
    first = explored(library).adapters[0]
    assert (first.losses, list(first.families)) == (None, [])
    assert len(first.provenance) == 40
    assert max(len(text) for _, text in first.provenance) <= 300


@pytest.mark.parametrize("has_map", [False, True])
def test_an_adapter_with_damaged_weights_is_named_whether_or_not_a_map_is_stored(
    library: Library, monkeypatch: pytest.MonkeyPatch, has_map: bool
) -> None:
    monkeypatch.setattr("lorary.report.explore_map.LEAST_TSNE", 4)
    if has_map:
        explore_page(library)
    weights = library.path / "adapters" / "a0" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(AdapterError, match=r"'a0' must have the sha256 of adapter_model\.safetensors"):
        explore_page(library)


def test_a_damaged_adapter_is_named(library: Library) -> None:
    (library.path / "adapters" / "a0" / "provenance.json").write_text("{")
    with pytest.raises(LibraryError, match=r"a0/provenance\.json"):
        explore_page(library)


def test_no_text_can_become_markup_and_only_the_script_of_the_page_may_run() -> None:
    plain = make_explored()
    names = {adapter.name: f"{adapter.name}{ATTACK}" for adapter in plain.adapters}
    attacked = replace(
        plain,
        name=ATTACK, base=ATTACK, router=ATTACK, cluster_note=ATTACK,
        adapters=[
            replace(adapter, name=names[adapter.name], tasks=[ATTACK], families=[ATTACK], targets=ATTACK,
                    alpha_note=ATTACK, provenance=[(ATTACK, ATTACK)])
            for adapter in plain.adapters
        ],
        nearest={names[name]: [(names[other], c) for other, c in pairs] for name, pairs in plain.nearest.items()},
    )  # fmt: skip
    for live in (False, True):
        page, hostile = (Page(render_explored(contents, live=live)) for contents in (plain, attacked))
        assert {tag for tag, _ in hostile.elements} == {tag for tag, _ in page.elements}
        assert hostile.scripts[1:] == page.scripts[1:]
        assert not any(name.startswith("on") for _, attributes in hostile.elements for name in attributes)
        policy = next(a["content"] or "" for _, a in hostile.elements if a.get("http-equiv"))
        assert policy.startswith("default-src 'none';")
        assert policy.count("sha256-") == 1
        assert ("connect-src 'self'" in policy) == live
        assert "unsafe-eval" not in policy


def test_the_page_loads_nothing_and_is_the_same_again() -> None:
    page = render_explored(make_explored(), live=True)
    assert page == render_explored(make_explored(), live=True)
    assert not any(
        attributes.get(key) for _, attributes in Page(page).elements for key in ("src", "srcset", "data", "action")
    )
    # The one address is the name of SVG.
    assert page.count("http") == page.count("http://www.w3.org/2000/svg") + page.count("http-equiv")


def test_the_page_of_1000_adapters_stays_small() -> None:
    assert len(render_explored(make_explored(1000))) < 1_600_000


def test_a_cluster_is_called_by_the_family_of_half_of_its_members_else_by_its_most_central_one() -> None:
    page = make_explored(8)
    assert cluster_names(page) == ["arithmetic", "dates", "facts", "strings"]
    alone = [replace(adapter, families=[]) for adapter in page.adapters]
    assert cluster_names(replace(page, adapters=alone))[1] in ("around dates_0001", "around dates_0005")


@settings(max_examples=20)
@given(st.integers(2, 40), st.integers(0, 1000))
def test_points_stay_on_the_map_and_near_adapters_are_near(number: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(number, 6))
    vectors[1] = vectors[0] + 1e-3 * random.normal(size=6)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    points = map_points(vectors @ vectors.T)
    assert points.shape == (number, 2)
    assert np.abs(points).max() <= 1
    distances = np.linalg.norm(points[0] - points, axis=1)
    assert distances[1] <= np.median(distances[1:])


def test_the_map_of_many_adapters_is_the_same_again_and_keeps_clusters_apart() -> None:
    random = np.random.default_rng(0)
    labels = np.arange(4 * LEAST_TSNE) % 4
    vectors = random.normal(size=(4, 16))[labels] + 0.4 * random.normal(size=(len(labels), 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    points = map_points(vectors @ vectors.T)
    np.testing.assert_array_equal(points, map_points(vectors @ vectors.T))
    distances = np.linalg.norm(points[:, None] - points, axis=-1)
    np.fill_diagonal(distances, np.inf)
    assert (labels[distances.argmin(axis=1)] == labels).mean() > 0.95
