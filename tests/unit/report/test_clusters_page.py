"""The map of clusters: what it says, what its plots are made of, and that no text of it can become code."""

import base64
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import drawn, needs_chromium
from hypothesis import given
from hypothesis import strategies as st
from pages import Page

from lorary.cluster.kmeans import Candidate
from lorary.errors import ShapeError, UsageError
from lorary.report.cluster_plots import MIXED, NUM_HUES, cluster_colour, cluster_tree, plane_plot, tree_plot
from lorary.report.clusters import ClusterMap, check_size, render_map, write_map

ATTACK = "</script><img src=x onerror=alert(1)>\"'&<!--\u2028"


def make_map(sizes: tuple[int, ...] = (3, 2, 1), seed: int = 0) -> ClusterMap:
    """Clusters around random directions, the adapters in an order that is not that of the clusters."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(len(sizes), 16, generator=generator, dtype=torch.float64)
    members = [label for label, size in enumerate(sizes) for _ in range(size)]
    labels = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
    noise = torch.randn(len(labels), 16, generator=generator, dtype=torch.float64)
    points = torch.nn.functional.normalize(centres[labels] + 0.3 * noise, dim=1)
    names = [f"task_{i:03}" for i in range(len(labels))]
    cosine = points @ points.T
    return ClusterMap(
        title="Clusters of lib",
        names=names,
        labels=labels,
        cosine=cosine,
        cohesion=[cohesion(cosine, labels, label) for label in range(len(sizes))],
        families={name: f"family_{label}" for name, label in zip(names[1:], labels[1:], strict=True)},
        silhouette=0.25,
        facts={"library": "lib"},
        versions={"lorary": "0.0"},
    )


def cohesion(cosine: torch.Tensor, labels: list[int], label: int) -> float | None:
    own = [i for i, other in enumerate(labels) if other == label]
    pairs = [float(cosine[i, j]) for i in own for j in own if i < j]
    return sum(pairs) / len(pairs) if pairs else None


class Sections(Page):
    """A page with its sections."""

    @property
    def sections(self) -> list[str | None]:
        return [attributes["id"] for tag, attributes in self.elements if tag == "section"]


def test_the_first_section_says_what_was_found() -> None:
    found = make_map()
    page = Sections(render_map(found))
    labels, cosine = torch.tensor(list(found.labels)), found.cosine
    same = labels[:, None] == labels
    pairs = torch.ones_like(same).triu(1)
    assert "6 adapters in 3 clusters" in page.text
    assert f"{cosine[pairs & same].mean():.2f} inside a cluster" in page.text
    assert "The mean silhouette is 0.25." in page.text
    assert "No two adapters compute the same" in page.text
    for value in found.cohesion[:2]:
        assert f"{value:.2f}" in page.text


def test_the_table_of_adapters_gives_the_nearest_ones_in_order() -> None:
    found = make_map((4, 3))
    text = Sections(render_map(found)).text.split("adapter family cluster nearest")[1]
    for i, name in enumerate(found.names):
        order = [j for j in found.cosine[i].argsort(descending=True).tolist() if j != i][:3]
        listed = " ".join(f"{found.names[j]} {found.cosine[i, j]:.2f}".replace("-", "−") for j in order)
        assert re.search(rf"{name} (family_\d|–) cluster {found.labels[i]} {re.escape(listed)}", text), name


def test_duplicates_and_zero_adapters_are_named_and_duplicates_do_not_sway_the_means() -> None:
    found = make_map()
    twice = [i for i, label in enumerate(found.labels) if label == 0][:2]
    cosine = found.cosine.clone()
    cosine[twice[1]], cosine[:, twice[1]] = cosine[twice[0]], cosine[:, twice[0]]
    group = tuple(found.names[i] for i in twice)
    page = Sections(render_map(replace(found, cosine=cosine, duplicates=[group], zero=["idle"])))
    assert f"Duplicates. These compute the same; each group counts once. {group[0]} and {group[1]}" in page.text
    assert "in no cluster: idle." in page.text
    kept = [i for i in range(6) if i != twice[1]]
    labels = torch.tensor(list(found.labels))[kept]
    inside = (labels[:, None] == labels) & torch.ones(5, 5, dtype=torch.bool).triu(1)
    assert f"mean cosine of {cosine[kept][:, kept][inside].mean():.2f} inside a cluster" in page.text


def test_sections_follow_what_there_is_to_show() -> None:
    candidates = [Candidate(2, 0.1, 0.9), Candidate(3, 0.2, 0.8)]
    full = ["clusters", "heat", "plane", "tree", "choice", "adapters", "reading"]
    assert Sections(render_map(replace(make_map(), candidates=candidates))).sections == full
    assert Sections(render_map(make_map())).sections == [key for key in full if key != "choice"]
    assert Sections(render_map(make_map((1, 1)))).sections == ["clusters", "heat", "tree", "adapters", "reading"]
    assert Sections(render_map(make_map((1,)))).sections == ["clusters", "adapters", "reading"]


def test_the_heat_map_is_in_the_order_of_the_clusters() -> None:
    found = make_map((4, 3, 1))
    plot = json.loads(Sections(render_map(found)).scripts[0])["similarity"]
    label = dict(zip(found.names, found.labels, strict=True))
    assert [label[name] for name in plot["names"]] == sorted(found.labels)
    assert [(b["family"], b["start"], b["end"]) for b in plot["blocks"]] == [
        ("cluster 0", 0, 4), ("cluster 1", 4, 7), ("cluster 2", 7, 8),
    ]  # fmt: skip
    values = np.frombuffer(base64.b64decode(plot["cosine"]), dtype="<i2").reshape(8, 8) / plot["parts"]
    order = [found.names.index(name) for name in plot["names"]]
    np.testing.assert_allclose(values, found.cosine[order][:, order].numpy(), atol=1e-4)


@given(st.integers(2, 12), st.integers(1, 4), st.integers(0, 1000))
def test_a_join_is_as_high_as_one_minus_the_mean_cosine_of_its_two_sides(number: int, k: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    points = random.normal(size=(number, 5))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    names, labels = [str(i) for i in range(number)], random.integers(k, size=number).tolist()
    plot = tree_plot(cluster_tree(points @ points.T), names, labels)
    assert sorted(plot["names"]) == sorted(names)
    assert [labels[int(name)] for name in plot["names"]] == plot["labels"]
    leaves = {float(place): [place] for place in range(number)}  # by the place at which an arm begins
    order = [int(name) for name in plot["names"]]
    for a, b, _, _, level, cluster in plot["joins"]:
        left, right = leaves.pop(a), leaves.pop(b)
        cosines = [points[order[i]] @ points[order[j]] for i in left for j in right]
        assert level == pytest.approx(1 - np.mean(cosines), abs=1e-4)
        under = {plot["labels"][i] for i in left + right}
        assert cluster == (under.pop() if len(under) == 1 else MIXED)
        leaves[(a + b) / 2] = left + right
    assert len(leaves) == 1


@given(st.integers(3, 12), st.integers(0, 1000))
def test_the_plane_keeps_the_distances_of_points_that_lie_in_a_plane(number: int, seed: int) -> None:
    angles = np.random.default_rng(seed).uniform(0, 2 * np.pi, size=number)
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    plot = plane_plot(points @ points.T, ["x"] * number, [0] * number)
    found = np.asarray(plot["points"])
    distances = [np.linalg.norm(p[:, None] - p, axis=-1) for p in (points, found)]
    np.testing.assert_allclose(*distances, atol=1e-3)
    assert plot["share"] == 1.0


def test_adapters_that_are_all_alike_have_a_map_too() -> None:
    same = make_map((4,))
    page = Sections(render_map(replace(same, cosine=torch.ones(4, 4), cohesion=[1.0])))
    assert json.loads(page.scripts[0])["plane"]["share"] == 1.0


def test_colours_of_twenty_clusters_differ_and_none_is_the_grey_of_mixed_branches() -> None:
    colours = [cluster_colour(cluster) for cluster in range(20)]
    assert len(set(colours)) == 20
    assert not {colour % NUM_HUES for colour in colours} & {NUM_HUES - 1}
    assert max(colours) < 3 * NUM_HUES  # three shades


def test_what_does_not_fit_is_refused() -> None:
    found = make_map()
    with pytest.raises(ShapeError, match="one name, one label and one row"):
        replace(found, labels=[0])
    with pytest.raises(ShapeError, match="must have a cohesion"):
        replace(found, cohesion=[0.5])
    with pytest.raises(UsageError, match=r"at most 1,000[\s\S]*found: 1001[\s\S]*--report"):
        check_size(1001)


def test_no_text_can_become_markup_and_only_the_script_of_the_page_may_run() -> None:
    plain = make_map()
    names = [f"{name}{ATTACK}" for name in plain.names]
    attacked = replace(
        plain, title=ATTACK, names=names, families=dict.fromkeys(names, ATTACK), duplicates=[names[:2]], zero=[ATTACK],
        facts={ATTACK: ATTACK}, versions={ATTACK: ATTACK},
    )  # fmt: skip
    page, hostile = Sections(render_map(plain)), Sections(render_map(attacked))
    assert {tag for tag, _ in hostile.elements} <= {tag for tag, _ in page.elements} | {"ul", "em"}
    assert hostile.scripts[1:] == page.scripts[1:]
    assert not any(name.startswith("on") for _, attributes in hostile.elements for name in attributes)
    assert json.loads(hostile.scripts[0])["plane"]["names"] == names
    policy = next(a["content"] or "" for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert policy.count("sha256-") == 1


def test_the_page_of_a_large_library_stays_small(tmp_path: Path) -> None:
    write_map(tmp_path / "large.html", make_map((60,) * 5))
    write_map(tmp_path / "small.html", make_map((1,)))
    assert (tmp_path / "large.html").stat().st_size - (tmp_path / "small.html").stat().st_size < 600_000


@needs_chromium
def test_a_browser_draws_every_plot_of_a_map(tmp_path: Path) -> None:
    candidates = [Candidate(2, 0.1, 0.9), Candidate(3, 0.2, 0.8), Candidate(4, 0.15, 0.7)]
    write_map(tmp_path / "map.html", replace(make_map((4, 3, 2)), candidates=candidates))
    places = [
        attrs["id"] for _, attrs in Page(drawn(tmp_path / "map.html")).elements if "plot" in str(attrs.get("class"))
    ]
    assert places == ["plot-similarity", "plot-plane", "plot-tree", "plot-choice"]
