"""Agreement of clusterings, and Mantel's test, against values that are known."""

import time

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from lorary.cluster.agreement import agreement, mantel
from lorary.cluster.baselines import family_labels, random_labels, text_labels
from lorary.errors import ShapeError, UsageError


def matrix(number: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(number, number, generator=generator, dtype=torch.float64)


def test_renaming_clusters_changes_nothing() -> None:
    assert agreement([0, 0, 1, 2], [5, 5, 3, 4]) == pytest.approx((1.0, 1.0))
    assert agreement([0, 0, 1, 2], ["b", "b", "c", "a"]) == pytest.approx((1.0, 1.0))


def test_crossing_clusterings_agree_no_better_than_chance() -> None:
    assert agreement([0, 0, 1, 1], [0, 1, 0, 1]) == pytest.approx((-0.5, 0.0))


def test_clusterings_of_different_adapters_are_refused() -> None:
    with pytest.raises(ShapeError, match="same adapters"):
        agreement([0, 1], [0, 1, 2])


def test_rho_is_spearmans_over_ordered_pairs(generator: torch.Generator) -> None:
    similarity, transfer = matrix(12, generator), matrix(12, generator)
    off = ~torch.eye(12, dtype=torch.bool)
    expected = spearmanr(similarity[off].numpy(), transfer[off].numpy()).statistic
    transfer.fill_diagonal_(torch.inf)  # plays no part
    assert mantel(similarity, transfer, permutations=10).rho == pytest.approx(expected, abs=1e-12)


def test_rho_beyond_the_family_is_the_partial_correlation(generator: torch.Generator) -> None:
    families = ["a", "b", "c"] * 4
    same = np.array([[one == other for other in families] for one in families], dtype=float)
    similarity, transfer = matrix(12, generator) + 2 * torch.from_numpy(same), matrix(12, generator)
    off = ~np.eye(12, dtype=bool)
    ranks = [np.argsort(np.argsort(m.numpy()[off])).astype(float) for m in (similarity, transfer)]
    design = np.stack([np.ones(132), same[off]], axis=1)
    left = [rank - design @ np.linalg.lstsq(design, rank, rcond=None)[0] for rank in ranks]
    expected = np.corrcoef(left)[0, 1]
    assert mantel(similarity, transfer, families, permutations=10).rho == pytest.approx(expected, abs=1e-12)


def test_a_real_relation_is_significant_and_chance_is_not(generator: torch.Generator) -> None:
    similarity, noise = matrix(20, generator), matrix(20, generator)
    assert mantel(similarity, similarity + noise, permutations=999).p == pytest.approx(1 / 1000)
    assert mantel(similarity, noise, permutations=999).p > 0.01
    assert mantel(similarity, -similarity, permutations=999).p > 0.99


def test_chance_is_significant_as_often_as_promised(generator: torch.Generator) -> None:
    values = [mantel(matrix(8, generator), matrix(8, generator), permutations=99).p for _ in range(200)]
    assert 0.01 < float(np.mean([p <= 0.1 for p in values])) < 0.2


def test_families_alone_are_no_relation_beyond_them(generator: torch.Generator) -> None:
    families = [index % 4 for index in range(24)]
    same = torch.tensor([[float(a == b) for b in families] for a in families], dtype=torch.float64)
    similarity, transfer = same + 0.1 * matrix(24, generator), same + 0.1 * matrix(24, generator)
    assert mantel(similarity, transfer, permutations=999).p == pytest.approx(1 / 1000)
    assert mantel(similarity, transfer, families, permutations=999).p > 0.01
    assert mantel(similarity, transfer, families, permutations=999, within=True).p > 0.01
    beyond = transfer + 0.3 * similarity.sub(same) / 0.1
    assert mantel(similarity, beyond, families, permutations=999).p < 0.01
    assert mantel(similarity, beyond, families, permutations=999, within=True).p < 0.01


def test_the_seed_decides_the_permutations(generator: torch.Generator) -> None:
    similarity, transfer = matrix(9, generator), matrix(9, generator)
    assert mantel(similarity, transfer, seed=1) == mantel(similarity, transfer, seed=1)
    assert mantel(similarity, transfer, seed=1).p != mantel(similarity, transfer, seed=2).p


def test_ten_thousand_permutations_of_fifty_tasks_take_seconds(generator: torch.Generator) -> None:
    start = time.process_time()
    mantel(matrix(52, generator), matrix(52, generator), [i % 16 for i in range(52)], within=True)
    assert time.process_time() - start < 10


def test_matrices_that_cannot_be_tested_are_refused(generator: torch.Generator) -> None:
    good, broken = matrix(4, generator), matrix(4, generator)
    broken[0, 1] = torch.nan
    with pytest.raises(UsageError, match="finite"):
        mantel(good, broken)
    with pytest.raises(UsageError, match="must not all be the same"):
        mantel(good, torch.ones(4, 4, dtype=torch.float64))
    with pytest.raises(ShapeError, match="same tasks"):
        mantel(good, good, ["a"])
    with pytest.raises(UsageError, match="strata to permute within"):
        mantel(good, good, within=True)


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
