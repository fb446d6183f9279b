"""Mantel's test of the benchmark, against values that are known."""

import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from lorary.errors import ShapeError, UsageError


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import mantel

    return mantel


def matrix(number: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(number, number, generator=generator, dtype=torch.float64)


def test_rho_is_spearmans_over_ordered_pairs(script: ModuleType, generator: torch.Generator) -> None:
    similarity, transfer = matrix(12, generator), matrix(12, generator)
    off = ~torch.eye(12, dtype=torch.bool)
    expected = spearmanr(similarity[off].numpy(), transfer[off].numpy()).statistic
    transfer.fill_diagonal_(torch.inf)  # plays no part
    assert script.mantel(similarity, transfer, permutations=10).rho == pytest.approx(expected, abs=1e-12)


def test_rho_beyond_the_family_is_the_partial_correlation(script: ModuleType, generator: torch.Generator) -> None:
    families = ["a", "b", "c"] * 4
    same = np.array([[one == other for other in families] for one in families], dtype=float)
    similarity, transfer = matrix(12, generator) + 2 * torch.from_numpy(same), matrix(12, generator)
    off = ~np.eye(12, dtype=bool)
    ranks = [np.argsort(np.argsort(m.numpy()[off])).astype(float) for m in (similarity, transfer)]
    design = np.stack([np.ones(132), same[off]], axis=1)
    left = [rank - design @ np.linalg.lstsq(design, rank, rcond=None)[0] for rank in ranks]
    expected = np.corrcoef(left)[0, 1]
    assert script.mantel(similarity, transfer, families, permutations=10).rho == pytest.approx(expected, abs=1e-12)


def test_a_real_relation_is_significant_and_chance_is_not(script: ModuleType, generator: torch.Generator) -> None:
    similarity, noise = matrix(20, generator), matrix(20, generator)
    assert script.mantel(similarity, similarity + noise, permutations=999).p == pytest.approx(1 / 1000)
    assert script.mantel(similarity, noise, permutations=999).p > 0.01
    assert script.mantel(similarity, -similarity, permutations=999).p > 0.99


def test_chance_is_significant_as_often_as_promised(script: ModuleType, generator: torch.Generator) -> None:
    values = [script.mantel(matrix(8, generator), matrix(8, generator), permutations=99).p for _ in range(200)]
    assert 0.01 < float(np.mean([p <= 0.1 for p in values])) < 0.2


def test_families_alone_are_no_relation_beyond_them(script: ModuleType, generator: torch.Generator) -> None:
    families = [index % 4 for index in range(24)]
    same = torch.tensor([[float(a == b) for b in families] for a in families], dtype=torch.float64)
    similarity, transfer = same + 0.1 * matrix(24, generator), same + 0.1 * matrix(24, generator)
    assert script.mantel(similarity, transfer, permutations=999).p == pytest.approx(1 / 1000)
    assert script.mantel(similarity, transfer, families, permutations=999).p > 0.01
    assert script.mantel(similarity, transfer, families, permutations=999, within=True).p > 0.01
    beyond = transfer + 0.3 * similarity.sub(same) / 0.1
    assert script.mantel(similarity, beyond, families, permutations=999).p < 0.01
    assert script.mantel(similarity, beyond, families, permutations=999, within=True).p < 0.01


def test_the_seed_decides_the_permutations(script: ModuleType, generator: torch.Generator) -> None:
    similarity, transfer = matrix(9, generator), matrix(9, generator)
    assert script.mantel(similarity, transfer, seed=1) == script.mantel(similarity, transfer, seed=1)
    assert script.mantel(similarity, transfer, seed=1).p != script.mantel(similarity, transfer, seed=2).p


def test_ten_thousand_permutations_of_fifty_tasks_take_seconds(script: ModuleType, generator: torch.Generator) -> None:
    start = time.process_time()
    script.mantel(matrix(52, generator), matrix(52, generator), [i % 16 for i in range(52)], within=True)
    assert time.process_time() - start < 10


def test_matrices_that_cannot_be_tested_are_refused(script: ModuleType, generator: torch.Generator) -> None:
    good, broken = matrix(4, generator), matrix(4, generator)
    broken[0, 1] = torch.nan
    with pytest.raises(UsageError, match="finite"):
        script.mantel(good, broken)
    with pytest.raises(UsageError, match="must not all be the same"):
        script.mantel(good, torch.ones(4, 4, dtype=torch.float64))
    with pytest.raises(ShapeError, match="same tasks"):
        script.mantel(good, good, ["a"])
    with pytest.raises(UsageError, match="strata to permute within"):
        script.mantel(good, good, within=True)
