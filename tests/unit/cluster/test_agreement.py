"""Agreement of clusterings, against values that are known."""

import pytest
import torch

from lorary.cluster.agreement import agreement
from lorary.cluster.baselines import family_labels, random_labels, text_labels
from lorary.errors import ShapeError, UsageError


def test_renaming_clusters_changes_nothing() -> None:
    assert agreement([0, 0, 1, 2], [5, 5, 3, 4]) == pytest.approx((1.0, 1.0))
    assert agreement([0, 0, 1, 2], ["b", "b", "c", "a"]) == pytest.approx((1.0, 1.0))


def test_crossing_clusterings_agree_no_better_than_chance() -> None:
    assert agreement([0, 0, 1, 1], [0, 1, 0, 1]) == pytest.approx((-0.5, 0.0))


def test_clusterings_of_different_adapters_are_refused() -> None:
    with pytest.raises(ShapeError, match="same adapters"):
        agreement([0, 1], [0, 1, 2])


def test_random_clusters_have_nearly_equal_sizes_in_any_order_of_names() -> None:
    names = [f"t{i}" for i in range(23)]
    labels = random_labels(names, 5, seed=3)
    assert sorted(labels.count(cluster) for cluster in range(5)) == [4, 4, 5, 5, 5]
    assert random_labels(names[::-1], 5, seed=3) == labels[::-1]
    assert random_labels(names, 5, seed=4) != labels


def test_families_are_clusters() -> None:
    assert family_labels(["nli", "qa", "nli", "code"]) == [1, 2, 1, 0]


def test_texts_that_point_the_same_way_are_a_cluster(generator: torch.Generator) -> None:
    centres = torch.randn(3, 16, generator=generator)
    points = centres.repeat(4, 1) * (1 + torch.rand(12, 1, generator=generator)) + 0.1
    assert agreement(text_labels(points, 3), [0, 1, 2] * 4).adjusted_rand == 1.0


def test_more_clusters_than_tasks_are_refused() -> None:
    with pytest.raises(UsageError, match="between 1 and 2"):
        random_labels(["a", "b"], 3)
