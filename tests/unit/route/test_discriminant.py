"""Discriminant scores are ratios of Mahalanobis distances, and their border is found by halves."""

import pytest
import torch
from torch.nn.functional import normalize

from lorary.errors import RouterError
from lorary.route.discriminant import (
    MOST_PROMPTS,
    NEIGHBOURS,
    OWN_LOST,
    SHRINKAGE,
    Discriminant,
    discriminant_scores,
    fit_discriminant,
)

EXPERTS, PROMPTS = 4, 12


def fit(samples: list[torch.Tensor]) -> Discriminant:
    """One task for each expert."""
    return fit_discriminant(samples, [torch.zeros(len(sample), dtype=torch.int64) for sample in samples])


def samples_of(
    width: int, generator: torch.Generator, apart: float = 3.0, experts: int = EXPERTS
) -> list[torch.Tensor]:
    centres = apart * torch.randn(experts, width, generator=generator, dtype=torch.float64)
    return [centre + torch.randn(PROMPTS, width, generator=generator, dtype=torch.float64) for centre in centres]


def by_hand(samples: list[torch.Tensor], requests: torch.Tensor) -> torch.Tensor:
    """Scores without the border, by the covariance and its inverse."""
    width = samples[0].shape[1]
    units = [normalize(sample, dim=1) for sample in samples]
    means = torch.stack([unit.mean(dim=0) for unit in units])
    residuals = torch.cat([unit - mean for unit, mean in zip(units, means, strict=True)])
    covariance = residuals.mT @ residuals / (len(residuals) - len(samples))
    eye = torch.eye(width, dtype=torch.float64)
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * covariance.trace() / width * eye
    gaps = normalize(requests, dim=1)[:, None] - means
    squares = torch.einsum("red,df,ref->re", gaps, covariance.inverse(), gaps)
    scores = torch.empty_like(squares)
    for e in range(squares.shape[1]):
        others = squares[:, [other for other in range(squares.shape[1]) if other != e]].sort(dim=1).values
        scores[:, e] = (others[:, :NEIGHBOURS].mean(dim=1) / squares[:, e]).log()
    return scores


@pytest.mark.parametrize("width", [8, 100], ids=["fewer features than prompts", "more"])
@pytest.mark.parametrize("experts", [2, 4, 11])
def test_scores_are_ratios_of_mahalanobis_distances(width: int, experts: int, generator: torch.Generator) -> None:
    samples = samples_of(width, generator, experts=experts)
    requests = torch.cat([torch.randn(5, width, generator=generator, dtype=torch.float64), samples[1][:2]])
    fitted = fit(samples)
    assert torch.allclose(discriminant_scores(requests, fitted) + fitted.border, by_hand(samples, requests), rtol=1e-8)


def test_the_border_is_that_of_halves_that_score_each_other(generator: torch.Generator) -> None:
    samples = samples_of(20, generator)
    own = []
    for half in (0, 1):
        fitted, scored = [s[half::2] for s in samples], [s[1 - half :: 2] for s in samples]
        for e in range(EXPERTS):
            own.append(by_hand(fitted, scored[e])[:, e])
    expected = torch.cat(own).quantile(OWN_LOST)
    assert torch.allclose(fit(samples).border, expected, rtol=1e-8)


def test_known_kinds_are_told_and_unknown_ones_fit_no_expert(generator: torch.Generator) -> None:
    centres = 3 * torch.randn(EXPERTS + 1, 30, generator=generator, dtype=torch.float64)
    drawn = centres[:, None] + torch.randn(EXPERTS + 1, 40, 30, generator=generator, dtype=torch.float64)
    fitted = fit(list(drawn[:EXPERTS, :PROMPTS]))
    known = discriminant_scores(drawn[:EXPERTS, PROMPTS:].flatten(0, 1), fitted)
    owners = torch.arange(EXPERTS).repeat_interleave(40 - PROMPTS)
    assert (known.argmax(dim=1) == owners).double().mean() > 0.95
    assert (known.amax(dim=1) > 0).double().mean() > 0.9
    assert (discriminant_scores(drawn[EXPERTS], fitted).amax(dim=1) < 0).double().mean() > 0.9


def test_scores_do_not_depend_on_the_length_of_vectors(generator: torch.Generator) -> None:
    samples = samples_of(10, generator)
    longer = fit([7 * sample for sample in samples])
    request = torch.randn(2, 10, generator=generator, dtype=torch.float64)
    expected = discriminant_scores(request, fit(samples))
    assert torch.allclose(discriminant_scores(0.1 * request, longer), expected, rtol=1e-8)


def test_many_prompts_are_thinned_for_the_covariance_alone(generator: torch.Generator) -> None:
    many = [torch.randn(MOST_PROMPTS, 6, generator=generator, dtype=torch.float64) + e for e in range(2)]
    few = [sample[: MOST_PROMPTS // 2] for sample in many]
    found, expected = fit(many), fit(few)
    assert torch.allclose(found.isotropic, expected.isotropic, rtol=0.1)
    assert torch.allclose(found.means[0], normalize(many[0], dim=1).mean(dim=0))


def test_equal_prompts_have_a_finite_score(generator: torch.Generator) -> None:
    same = [torch.ones(4, 5) * (e + 1) + torch.eye(5)[e] for e in range(2)]
    scores = discriminant_scores(torch.eye(5), fit(same))
    assert scores.isfinite().all()


def test_one_expert_takes_what_is_like_most_of_its_prompts(generator: torch.Generator) -> None:
    sample = 5 + torch.randn(30, 8, generator=generator, dtype=torch.float64)
    fitted = fit([sample])
    assert (discriminant_scores(sample, fitted) > 0).double().mean() >= 0.9
    assert discriminant_scores(-sample, fitted).amax() < 0


def test_an_expert_of_tasks_that_lie_apart_is_as_near_as_its_nearest_task(generator: torch.Generator) -> None:
    samples = samples_of(20, generator, apart=6.0)
    requests = torch.cat(samples)
    tasks = [torch.arange(2).repeat_interleave(PROMPTS), *[torch.zeros(PROMPTS, dtype=torch.int64)] * 2]
    joined = discriminant_scores(requests, fit_discriminant([torch.cat(samples[:2]), *samples[2:]], tasks))
    assert joined.shape == (EXPERTS * PROMPTS, EXPERTS - 1)
    apart = discriminant_scores(requests, fit(samples)).argmax(dim=1)
    assert torch.equal(joined.argmax(dim=1), (apart - 1).clamp_min(0))
    assert (joined.amax(dim=1) > 0).double().mean() > 0.9


def test_twins_hide_neither_an_expert_nor_that_none_fits(generator: torch.Generator) -> None:
    """Every expert twice: the nearest other one is always as near, and says nothing."""
    centres = 4 * torch.randn(7, 20, generator=generator, dtype=torch.float64)
    drawn = centres[:, None] + torch.randn(7, 40, 20, generator=generator, dtype=torch.float64)
    fitted = fit([sample[half:24:2] for sample in drawn[:5] for half in (0, 1)])
    known = discriminant_scores(drawn[:5, 24:].flatten(0, 1), fitted)
    owners = torch.arange(5).repeat_interleave(16)
    assert (known.argmax(dim=1) // 2 == owners).double().mean() > 0.95
    assert (known.amax(dim=1) > 0).double().mean() > 0.85
    unknown = discriminant_scores(drawn[5:].flatten(0, 1), fitted)
    assert (unknown.amax(dim=1) < 0).double().mean() > 0.9


def test_three_prompts_of_each_kind_are_too_few() -> None:
    with pytest.raises(RouterError, match="4 prompts"):
        fit([torch.rand(3, 3), torch.rand(3, 3)])


def test_a_task_with_one_prompt_takes_part(generator: torch.Generator) -> None:
    samples = samples_of(10, generator)
    lone = 5 * torch.ones(1, 10, dtype=torch.float64)
    assert discriminant_scores(lone, fit([*samples, lone])).argmax() == EXPERTS
