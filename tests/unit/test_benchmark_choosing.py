"""Rules for requests are compared on vectors whose answers are known."""

from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture
def choosing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import choosing

    return choosing


def test_known_above_unknown_is_counted_in_pairs(choosing: ModuleType) -> None:
    known, unknown = torch.tensor([3.0, 1.0]), torch.tensor([2.0, 1.0])
    assert choosing.auc(known, unknown) == (1 + 1 + 0 + 0.5) / 4


def test_sums_that_experts_add_one_by_one_give_the_map_of_all_at_once(
    choosing: ModuleType, generator: torch.Generator
) -> None:
    samples = [torch.randn(6, 5, generator=generator) + 3 * torch.eye(5)[e] for e in range(3)]
    ridge = choosing.Ridge(5)
    for sample in samples:
        ridge.add(sample)
    vectors = choosing.with_one(torch.cat(samples))
    targets = torch.eye(3, dtype=torch.float64).repeat_interleave(6, dim=0)
    level = 0.1 * (vectors.mT @ vectors).diagonal()[:-1].mean()
    weights = torch.linalg.solve(vectors.mT @ vectors + level * torch.eye(6), vectors.mT @ targets)
    assert torch.allclose(ridge.scores(0.1)(samples[1]), choosing.with_one(samples[1]) @ weights)


def test_every_rule_tells_clear_experts_apart_and_has_all_figures(
    choosing: ModuleType, generator: torch.Generator
) -> None:
    centres = 8 * torch.eye(40)

    def near(centre: int, count: int) -> torch.Tensor:
        return centres[centre] + torch.randn(count, 40, generator=generator)

    rows = choosing.measure([near(e, 12) for e in range(4)], [near(e, 6) for e in range(4)], near(9, 20))
    figures = {(row["case"], row["figure"]): row["ours"] for row in rows}
    rules = {rule for rule, _ in figures}
    assert {"discriminant", "ridge", "retrieval", "nearest 1"} <= rules
    assert all(figures[rule, "right expert"] == 1.0 for rule in rules)
    assert all(figures[rule, "known"] > 0.9 for rule in ("discriminant", "ridge", "retrieval"))
    lines = choosing.table(rows)
    assert len(lines) == 2 + len(rules)
    assert lines[2].startswith("| discriminant | 1.000 |")
