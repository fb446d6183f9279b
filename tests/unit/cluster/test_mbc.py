"""Model-based clustering finds groups, and says what is to be said about them."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from lorary.adapter import Adapter, LoraFactors
from lorary.cluster.compare import METHODS
from lorary.cluster.mbc import Clustering, cluster_adapters
from lorary.errors import AdapterError, UsageError

Make = Callable[..., Adapter]
Groups = dict[str, Adapter]


def clustered(adapters: Mapping[str, Adapter], **settings: Any) -> Clustering:
    return cluster_adapters(list(adapters), adapters.__getitem__, **settings)


def scaled(adapter: Adapter, name: str, factor: float) -> Adapter:
    modules = {path: LoraFactors(f.lora_a, f.lora_b * factor, f.scaling) for path, f in adapter}
    return replace(adapter, name=name, modules=modules)


def regauged(adapter: Adapter, name: str) -> Adapter:
    modules = {path: LoraFactors(4 * f.lora_a.flip(0), f.lora_b.flip(1), f.scaling / 4) for path, f in adapter}
    return replace(adapter, name=name, modules=modules)


@pytest.mark.parametrize("method", METHODS)
def test_groups_are_found_and_numbered_by_size(groups: Groups, method: str) -> None:
    found = clustered(groups, k=4, method=method)
    assert found.names == tuple(groups)
    assert found.labels == tuple(int(name[1]) for name in groups)
    assert found.k == 4
    assert found.silhouette is not None
    assert found.silhouette > 0.3
    assert found.stability is None
    assert all(cohesion is not None and cohesion > 0.5 for cohesion in found.cohesion)
    assert found.zero == found.duplicates == ()


def test_clusters_of_one_size_are_numbered_by_the_first_name(made: Make) -> None:
    adapters = {name: made(name, group) for name, group in {"a": 2, "d": 2, "c": 0, "b": 0}.items()}
    assert clustered(adapters, k=2).labels == (0, 0, 1, 1)


def test_the_number_of_clusters_is_found(groups: Groups) -> None:
    found = clustered(groups, k="auto")
    assert found.k == 4
    assert [candidate.k for candidate in found.candidates] == list(range(2, 10))
    assert found.stability == next(c.stability for c in found.candidates if c.k == 4)
    assert found.stability > 0.9


def test_auto_tries_the_candidates_given(groups: Groups) -> None:
    found = clustered(groups, k="auto", candidates=(3, 5, 400))
    assert [candidate.k for candidate in found.candidates] == [3, 5]


def test_cohesion_is_the_mean_cosine_of_distinct_members(groups: Groups) -> None:
    found = clustered(groups, k=4)
    members = [i for i, label in enumerate(found.labels) if label == 2]
    pairs = [float(found.similarity[i, j]) for i in members for j in members if i != j]
    assert found.cohesion[2] == pytest.approx(sum(pairs) / len(pairs))


def test_a_cluster_of_one_has_no_cohesion(made: Make) -> None:
    adapters = {"a": made("a", 0), "b": made("b", 0), "alone": made("alone", 1)}
    assert clustered(adapters, k=2).cohesion[1] is None


@pytest.mark.parametrize("method", METHODS)
def test_adapters_that_compute_nothing_are_in_no_cluster(groups: Groups, method: str) -> None:
    groups["an-empty"] = scaled(groups["g0-0"], "an-empty", 0.0)
    found = clustered(groups, k=4, method=method)
    assert found.zero == ("an-empty",)
    assert found.labels == (*(int(name[1]) for name in groups if name != "an-empty"), -1)
    assert found.similarity[-1].tolist() == [0.0] * 19 + [1.0]
    assert found.nearest["an-empty"] == []
    assert all("an-empty" not in dict(near) for near in found.nearest.values())


@pytest.mark.parametrize("method", METHODS)
def test_duplicates_are_told_and_share_their_label(groups: Groups, method: str) -> None:
    before = clustered(groups, k=4, method=method)
    groups |= {name: regauged(groups["g3-1"], name) for name in ("a-copy", "z-copy")}
    with warnings.catch_warnings():
        if method == "paper-2024":  # another gauge looks like another draw to it
            warnings.simplefilter("ignore")
        found = clustered(groups, k=4, method=method)
    assert found.duplicates == (("g3-1", "a-copy", "z-copy"),)
    assert len({found.labels[found.names.index(name)] for name in ("g3-1", "a-copy", "z-copy")}) == 1
    assert found.silhouette == pytest.approx(before.silhouette, abs=1e-6 if method != "paper-2024" else 0.2)


def test_the_same_direction_in_another_size_is_no_duplicate(groups: Groups) -> None:
    groups["louder"] = scaled(groups["g0-0"], "louder", 1.1)
    found = clustered(groups, k=4)
    assert found.duplicates == ()
    assert found.nearest["louder"][0] == ("g0-0", pytest.approx(1.0))


def test_the_nearest_are_the_most_similar_others(groups: Groups) -> None:
    found = clustered(groups, k=4)
    row = found.similarity[0].clone()
    row[0] = -2
    assert found.nearest["g0-0"] == [(found.names[i], float(row[i])) for i in row.argsort(descending=True)[:5]]


def test_each_adapter_is_read_once(groups: Groups) -> None:
    for method in METHODS:
        read: list[str] = []
        cluster_adapters(list(groups), lambda name: (read.append(name), groups[name])[1], k=4, method=method)  # noqa: B023
        assert sorted(read) == sorted(groups)


def test_flattened_factors_of_two_draws_are_warned_of_by_name(made: Make) -> None:
    adapters = {f"{draw}{i}": made(f"{draw}{i}", i % 2, draw=draw) for draw in "ab" for i in range(4)}
    with pytest.warns(UserWarning, match=r"'a0' and 'b0' began from different initial draws.*there are 2 draws"):
        clustered(adapters, k=2, method="paper-2024")
    clustered(adapters, k=2, method="delta")


def test_flattened_factors_of_unequal_ranks_are_refused_by_name(made: Make) -> None:
    adapters = {"a": made("a", 0), "b": made("b", 0, rank=2)}
    with pytest.raises(AdapterError, match=r"'a' and 'b' must have one rank at layer 'layers.0.q_proj'(.|\n)*3 and 2"):
        clustered(adapters, k=1, method="paper-2024")
    assert clustered(adapters, k=2).k == 2


def test_factors_of_which_nothing_is_left_are_refused_by_name() -> None:
    same = Adapter("same", {"layer": LoraFactors(torch.ones(2, 4), torch.ones(4, 2), 1.0)}, {})
    with pytest.raises(AdapterError, match=r"'same' must have numbers beyond the quantile 0.5"):
        clustered({"same": same}, k=1, method="paper-2024")


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_of_two_shapes_is_refused_by_name(made: Make, method: str) -> None:
    factors = LoraFactors(torch.ones(3, 7), torch.ones(40, 3), 1.0)
    other = Adapter("other", {"layers.0.q_proj": factors}, {})
    with pytest.raises(AdapterError, match=r"'a' and 'other' must have the same \(d_in, d_out\) at layer"):
        clustered({"a": made("a", 0), "other": other}, k=1, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_numbers_that_are_not_finite_are_refused_by_name(groups: Groups, method: str) -> None:
    groups["g1-2"] = scaled(groups["g1-2"], "g1-2", float("nan"))
    with pytest.raises(AdapterError, match="'g1-2' must have finite numbers"):
        clustered(groups, k=4, method=method)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"k": 20}, "k must be between 1 and 19"),
        ({"k": 0}, "k must be between 1 and 19"),
        ({"k": 4, "method": "magic"}, "the clustering method must be one of delta, paper-2024, sketch"),
        ({"k": "auto", "candidates": (1, 19)}, "k 'auto' needs a number of clusters from 2 on"),
    ],
)
def test_options_out_of_range_are_refused(groups: Groups, settings: dict[str, Any], rule: str) -> None:
    with pytest.raises(UsageError, match=rule):
        clustered(groups, **settings)


def test_a_name_given_twice_is_refused(groups: Groups) -> None:
    with pytest.raises(UsageError, match="each named once"):
        cluster_adapters(["g0-0", "g0-0"], groups.__getitem__, k=1)


def test_more_clusters_than_directions_are_refused(made: Make) -> None:
    one = made("a", 0)
    adapters = {"a": one, "b": scaled(one, "b", 2.0), "c": scaled(one, "c", 4.0)}
    with pytest.raises(UsageError, match=r"3 adapters of different directions(.|\n)*ask for --k 1"):
        clustered(adapters, k=3)


def test_a_library_that_computes_nothing_is_refused(made: Make) -> None:
    with pytest.raises(UsageError, match="at least one adapter must compute something"):
        clustered({"a": scaled(made("a", 0), "a", 0.0)}, k=1)
