"""Discriminant: the expert in whose prompts' normal distribution a request lies, or none where it lies in no one's."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from lorary.errors import RouterError

# Part of the shared covariance that is replaced by a multiple of the identity: prompts are fewer than features.
SHRINKAGE = 0.1
# Which part of the prompts whose own expert is taken away lies below the border.
NOTHING_FITS = 0.9
# Prompts of which the shared covariance is made; more of them change it little, and its cost grows with their square.
MOST_PROMPTS = 2048


class Discriminant(NamedTuple):
    """Normal distributions of one covariance, one for each task of each expert, all in float64.

    Args:
        means: (tasks, features), of unit vectors of each task's prompts.
        owners: (tasks,) int64, the expert of each task.
        directions: (features, kept), by which the square of a distance is less than `isotropic` says.
        isotropic: the square of the distance of a unit step in any direction that prompts do not vary in.
        border: the logarithmic density, up to a constant that is the same for all, at which a request fits as well as
            the best foreign expert fits nine tenths of the prompts.
    """

    means: Tensor
    owners: Tensor
    directions: Tensor
    isotropic: Tensor
    border: Tensor

    def to(self, features: Tensor) -> "Discriminant":
        """The same where the features are; it stays float64, since densities far from a mean are large numbers."""
        return Discriminant(*(part.to(features.device) for part in self))


def fit_discriminant(
    samples: Sequence[Float[Tensor, "_prompts features"]], tasks: Sequence[Int[Tensor, " _prompts"]]
) -> Discriminant:
    """Distributions of the experts' prompts, and the border below which nothing fits.

    The border is found with the experts' own prompts: each is scored with its own expert taken away, which is how a
    request looks that no expert was trained for.

    Args:
        samples: for each expert the vectors of some of its prompts, any float dtype.
        tasks: the task of each of these prompts, as any number: tasks of one expert may lie far apart.

    Returns:
        What `discriminant_scores` reads.

    Raises:
        RouterError: if no expert has two prompts of one task, so that nothing says how far prompts lie apart.
    """
    sizes = torch.tensor([len(sample) for sample in samples])
    expert_of_prompt = torch.arange(len(samples)).repeat_interleave(sizes)
    labels = torch.stack([expert_of_prompt, torch.cat(list(tasks)).long()], dim=1)
    kinds, kind_of_prompt, counts = labels.unique(dim=0, return_inverse=True, return_counts=True)
    if int(counts.max()) < 2:
        raise RouterError(
            "discriminant needs two prompts of a task, to say how far prompts of one kind lie apart",
            found="one of each",
            remedy="lorary library prepare LIB --router discriminant --rows 16",
        )
    vectors = normalize(torch.cat([sample.double() for sample in samples]), dim=1)
    sums = vectors.new_zeros(len(kinds), vectors.shape[1]).index_add(0, kind_of_prompt, vectors)
    means = sums / counts[:, None]
    directions, isotropic = _whitening(vectors - means[kind_of_prompt], len(kinds))
    fitted = Discriminant(means, kinds[:, 0], directions, isotropic, isotropic.new_zeros(()))
    scores = discriminant_scores(vectors, fitted)
    own = expert_of_prompt[:, None]
    if len(samples) > 1:
        border = scores.scatter(1, own, -torch.inf).amax(dim=1).quantile(NOTHING_FITS)
    else:  # no prompt is foreign: nearly all of its own are to fit
        border = scores.gather(1, own).quantile(1 - NOTHING_FITS)
    return fitted._replace(border=border)


def discriminant_scores(
    features: Float[Tensor, "batch features"], fitted: Discriminant
) -> Float[Tensor, "batch experts"]:
    """Logarithmic density of a request under each expert's likeliest task, less the border: above 0, the expert fits.

    With one task for each expert, the softmax of the scores is the probability that the request is an expert's own
    (linear discriminant analysis with equal priors).

    Args:
        features: one vector for each prompt.
        fitted: of `fit_discriminant`.

    Returns:
        Scores in float64.
    """
    units, means = normalize(features.double(), dim=-1), fitted.means
    plain = _squares(units, means)
    along = _squares(units @ fitted.directions, means @ fitted.directions)
    by_task = (along - fitted.isotropic * plain) / 2 - fitted.border
    num_experts = int(fitted.owners[-1]) + 1  # owners ascend, and each expert has a task
    scores = by_task.new_full((len(units), num_experts), -torch.inf)
    return scores.scatter_reduce(1, fitted.owners.expand(len(units), -1), by_task, "amax")


def _squares(rows: Tensor, others: Tensor) -> Tensor:
    """(rows, others) squared distances, from differences: those of products would lose what is small."""
    return torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist").square()


def _whitening(residuals: Tensor, num_kinds: int) -> tuple[Tensor, Tensor]:
    """Directions and isotropic part of the inverse of the shrunk covariance of residuals, without forming it."""
    num_prompts, width = residuals.shape
    if num_prompts > MOST_PROMPTS:
        order = torch.randperm(num_prompts, generator=torch.Generator().manual_seed(0))
        residuals = residuals[order[:MOST_PROMPTS]]
    freedom = len(residuals) * (num_prompts - num_kinds) / num_prompts
    _, singular, rows = torch.linalg.svd(residuals, full_matrices=False)
    variances = singular.square() / max(freedom, 1.0)
    level = (SHRINKAGE * variances.sum() / width).clamp_min(torch.finfo(residuals.dtype).eps)
    isotropic = 1 / level
    kept = isotropic - 1 / ((1 - SHRINKAGE) * variances + level)
    return rows.mT * kept.clamp_min(0).sqrt(), isotropic
