"""Discriminant scores equal normal densities, and their zero is where a foreign prompt fits as well as most do."""

import pytest
import torch
from torch.nn.functional import normalize

from lorary.errors import RouterError
from lorary.route.discriminant import (
    MOST_PROMPTS,
    NOTHING_FITS,
    SHRINKAGE,
    Discriminant,
    discriminant_scores,
    fit_discriminant,
)

EXPERTS, PROMPTS = 4, 12


def fit(samples: list[torch.Tensor]) -> Discriminant:
    """One task for each expert."""
    return fit_discriminant(samples, [torch.zeros(len(sample), dtype=torch.int64) for sample in samples])


def samples_of(width: int, generator: torch.Generator, apart: float = 3.0) -> list[torch.Tensor]:
    centres = apart * torch.randn(EXPERTS, width, generator=generator, dtype=torch.float64)
    return [centre + torch.randn(PROMPTS, width, generator=generator, dtype=torch.float64) for centre in centres]


@pytest.mark.parametrize("width", [8, 100], ids=["fewer features than prompts", "more"])
def test_scores_are_log_densities_under_the_shrunk_covariance(width: int, generator: torch.Generator) -> None:
    samples = samples_of(width, generator)
    fitted = fit(samples)
    units = [normalize(sample, dim=1) for sample in samples]
    means = torch.stack([unit.mean(dim=0) for unit in units])
    residuals = torch.cat([unit - mean for unit, mean in zip(units, means, strict=True)])
    covariance = residuals.mT @ residuals / (len(residuals) - EXPERTS)
    eye = torch.eye(width, dtype=torch.float64)
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * covariance.trace() / width * eye
    requests = torch.randn(5, width, generator=generator, dtype=torch.float64)
    gaps = normalize(requests, dim=1)[:, None] - means
    expected = -0.5 * torch.einsum("red,df,ref->re", gaps, covariance.inverse(), gaps)
    assert torch.allclose(discriminant_scores(requests, fitted) + fitted.border, expected, rtol=1e-8)


def test_the_border_is_where_nine_tenths_of_foreign_prompts_lie_below(generator: torch.Generator) -> None:
    samples = samples_of(20, generator)
    fitted = fit(samples)
    scores = discriminant_scores(torch.cat(samples), fitted).view(EXPERTS, PROMPTS, EXPERTS)
    foreign = torch.cat([scores[e][:, [other for other in range(EXPERTS) if other != e]] for e in range(EXPERTS)])
    below = (foreign.amax(dim=1) < 0).double().mean()
    assert abs(below - NOTHING_FITS) <= 1 / (EXPERTS * PROMPTS)
    own = torch.stack([scores[e][:, e] for e in range(EXPERTS)])
    assert (own > 0).double().mean() > 0.9


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
    same = [torch.ones(3, 5) * (e + 1) + torch.eye(5)[e] for e in range(2)]
    scores = discriminant_scores(torch.eye(5), fit(same))
    assert scores.isfinite().all()


def test_one_expert_takes_what_is_like_most_of_its_prompts(generator: torch.Generator) -> None:
    sample = 5 + torch.randn(30, 8, generator=generator, dtype=torch.float64)
    fitted = fit([sample])
    assert (discriminant_scores(sample, fitted) > 0).double().mean() >= 0.9
    assert discriminant_scores(-sample, fitted).amax() < 0


def test_an_expert_of_tasks_that_lie_apart_has_a_distribution_for_each(generator: torch.Generator) -> None:
    samples = samples_of(20, generator, apart=6.0)
    tasks = [torch.arange(2).repeat_interleave(PROMPTS), *[torch.zeros(PROMPTS, dtype=torch.int64)] * 2]
    joined = fit_discriminant([torch.cat(samples[:2]), *samples[2:]], tasks)
    scores = discriminant_scores(torch.cat(samples), joined)
    apart = discriminant_scores(torch.cat(samples), fit(samples)) + fit(samples).border
    assert scores.shape == (EXPERTS * PROMPTS, EXPERTS - 1)
    assert torch.allclose(scores[:, 0] + joined.border, apart[:, :2].amax(dim=1), rtol=1e-8)
    assert torch.allclose(scores[:, 1:] + joined.border, apart[:, 2:], rtol=1e-8)


def test_one_prompt_of_each_kind_is_too_few() -> None:
    with pytest.raises(RouterError, match="two prompts"):
        fit([torch.ones(1, 3), torch.ones(1, 3)])
