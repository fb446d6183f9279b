"""Discriminant: the expert in whose prompts' normal distribution the request lies, or none where it lies in no one's."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from lorary.errors import RouterError

# Part of the shared covariance that is replaced by a multiple of the identity: prompts are fewer than features.
SHRINKAGE = 0.1
# Which part of the prompts whose own expert is taken away lies below the border.
NOTHING_FITS = 0.9
# Prompts of which the shared covariance is made; more of them change it little, and its cost grows with their square.
MOST_PROMPTS = 2048
# With fewer prompts than these, an expert's mean and the covariance around it say nothing.
FEWEST_PROMPTS = 2


class Discriminant(NamedTuple):
    """Normal distributions of one covariance, one for each expert, all in float64.

    Args:
        means: (experts, features), of unit vectors of each expert's prompts.
        directions: (features, kept), by which the square of a distance is less than `isotropic` says.
        isotropic: the square of the distance of a unit step in any direction that prompts do not vary in.
        border: the logarithmic density, up to a constant that is the same for all, at which a request fits as well as
            the best foreign expert fits nine tenths of the prompts.
    """

    means: Tensor
    directions: Tensor
    isotropic: Tensor
    border: Tensor

    def to(self, features: Tensor) -> "Discriminant":
        """The same where the features are; it stays float64, since densities far from a mean are large numbers."""
        return Discriminant(*(part.to(features.device) for part in self))


def fit_discriminant(samples: Sequence[Float[Tensor, "_prompts features"]]) -> Discriminant:
    """Distributions of the experts' prompts, and the border below which nothing fits.

    The border is found with the experts' own prompts: each is scored with its own expert taken away, which is how a
    request looks that no expert was trained for.

    Args:
        samples: for each expert the vectors of some of its prompts, any float dtype.

    Returns:
        What `discriminant_scores` reads.

    Raises:
        RouterError: if there are too few prompts.
    """
    sizes = [len(sample) for sample in samples]
    if min(sizes) < FEWEST_PROMPTS:
        raise RouterError(
            f"discriminant needs {FEWEST_PROMPTS} prompts of each expert",
            found=f"{min(sizes)} of the expert number {sizes.index(min(sizes))}",
            remedy="lorary library prepare --router discriminant --rows 16",
        )
    vectors = normalize(torch.cat([sample.double() for sample in samples]), dim=1)
    owners = torch.arange(len(samples)).repeat_interleave(torch.tensor(sizes))
    means = torch.stack([part.mean(dim=0) for part in vectors.split(sizes)])
    directions, isotropic = _whitening(vectors - means[owners], len(samples))
    fitted = Discriminant(means, directions, isotropic, isotropic.new_zeros(()))
    scores = discriminant_scores(vectors, fitted)
    if len(samples) > 1:
        foreign = scores.scatter(1, owners[:, None], -torch.inf).amax(dim=1)
        border = foreign.quantile(NOTHING_FITS)
    else:
        border = scores[:, 0].quantile(1 - NOTHING_FITS)
    return fitted._replace(border=border)


def discriminant_scores(
    features: Float[Tensor, "batch features"], fitted: Discriminant
) -> Float[Tensor, "batch experts"]:
    """Logarithmic density of a request under each expert's distribution, less the border: above 0, the expert fits.

    The softmax of the scores is the probability that the request is of an expert's kind (linear discriminant analysis
    with equal priors).

    Args:
        features: one vector for each prompt.
        fitted: of `fit_discriminant`.

    Returns:
        Scores in float64.
    """
    gaps = normalize(features.double(), dim=-1)[:, None] - fitted.means
    squares = fitted.isotropic * gaps.square().sum(dim=-1) - (gaps @ fitted.directions).square().sum(dim=-1)
    return -squares / 2 - fitted.border


def _whitening(residuals: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Directions and isotropic part of the inverse of the shrunk covariance of residuals, without forming it."""
    num_prompts, width = residuals.shape
    if num_prompts > MOST_PROMPTS:
        order = torch.randperm(num_prompts, generator=torch.Generator().manual_seed(0))
        residuals = residuals[order[:MOST_PROMPTS]]
    freedom = max(len(residuals) - num_classes * len(residuals) / num_prompts, 1.0)
    _, singular, rows = torch.linalg.svd(residuals, full_matrices=False)
    variances = singular.square() / freedom
    level = (SHRINKAGE * variances.sum() / width).clamp_min(torch.finfo(residuals.dtype).tiny)
    isotropic = 1 / level
    kept = isotropic - 1 / ((1 - SHRINKAGE) * variances + level)
    return rows.mT * kept.clamp_min(0).sqrt(), isotropic
