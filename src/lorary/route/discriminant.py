"""Discriminant: the expert whose prompts a request is nearest to, as prompts of one kind vary; none where all are as
near.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from lorary.errors import RouterError
from lorary.ops.upload import upload

# Part of the shared covariance that is replaced by a multiple of the identity: prompts are fewer than features.
SHRINKAGE = 0.1
# Experts beside one, the nearest of which say how far "far" is. More than one, so that a twin does not hide it.
NEIGHBOURS = 7
# Which part of an expert's own prompts may lie below the border.
OWN_LOST = 0.05
# Prompts of which the shared covariance is made; more of them change it little, and its cost grows with their square.
MOST_PROMPTS = 2048
# Of one task: half of them tell means and covariance for the border, and have to vary.
FEWEST_PROMPTS = 4


class Discriminant(NamedTuple):
    """Where the prompts of each task of each expert lie, and how prompts of one task vary; float64.

    Args:
        means: (tasks, features), of unit vectors of each task's prompts.
        owners: (tasks,) int64, the expert of each task, ascending.
        directions: (features, kept), by which the square of a distance is less than `isotropic` says.
        isotropic: the square of the distance of a unit step in any direction in which prompts do not vary.
        border: what is taken from scores, so that an expert fits above 0.
        num_experts: one more than the last owner.
        num_near: experts that own a task.
    """

    means: Tensor
    owners: Tensor
    directions: Tensor
    isotropic: Tensor
    border: Tensor
    num_experts: int
    num_near: int

    def to(self, place: Tensor | torch.device) -> "Discriminant":
        """The same where a tensor is, or on a device; float64 there: distances in float32 would lose what is near."""
        *tensors, num_experts, num_near = self
        device = place.device if isinstance(place, Tensor) else place
        means, owners, directions, isotropic, border = (upload(tensor, device) for tensor in tensors)
        return Discriminant(means, owners, directions, isotropic, border, num_experts, num_near)


def fit_discriminant(
    samples: Sequence[Float[Tensor, "_prompts features"]], tasks: Sequence[Int[Tensor, " _prompts"]]
) -> Discriminant:
    """Linear discriminant analysis of the experts' prompts, and the border below which nothing fits.

    The border comes from halves: means and covariance of one half of the prompts score the other. It lies where
    `OWN_LOST` of the prompts have less for their own expert. A part of what they have for the best *foreign* expert
    would be a worse border: it depends on how alike the tasks of a library are (docs/routers.md has the figures).

    Args:
        samples: for each expert the vectors of some of its prompts, any float dtype.
        tasks: the task of each of these prompts, as any number: tasks of one expert may lie far apart.

    Returns:
        What `discriminant_scores` reads.

    Raises:
        RouterError: if no expert has four prompts of one task.
    """
    sizes = torch.tensor([len(sample) for sample in samples])
    owners = torch.arange(len(samples)).repeat_interleave(sizes)
    labels = torch.stack([owners, torch.cat(list(tasks)).long()], dim=1)
    kinds, kind_of_prompt, counts = labels.unique(dim=0, return_inverse=True, return_counts=True)
    if int(counts.max()) < FEWEST_PROMPTS:
        raise RouterError(
            f"discriminant needs {FEWEST_PROMPTS} prompts of a task, to say how far prompts of one kind lie apart",
            found=f"at most {int(counts.max())}",
            remedy="lorary library prepare LIB --router discriminant --rows 16",
        )
    vectors = normalize(torch.cat([sample.double() for sample in samples]), dim=1)
    fitted = _fit(vectors, kind_of_prompt, kinds[:, 0])
    order = kind_of_prompt.argsort(stable=True)
    number_in_kind = torch.empty_like(order)
    number_in_kind[order] = torch.arange(len(order)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    own = []
    for half in (0, 1):
        is_fitted = number_in_kind % 2 == half
        # A task with one prompt has no half that could tell of it.
        is_scored = ~is_fitted & (counts[kind_of_prompt] > 1)
        halved = _fit(vectors[is_fitted], kind_of_prompt[is_fitted], kinds[:, 0])
        distances = _distances(vectors[is_scored], halved, len(samples))
        mine = owners[is_scored][:, None]
        own.append(_scores(distances, halved.num_near).gather(1, mine).squeeze(1))
    return fitted._replace(border=torch.cat(own).quantile(OWN_LOST))


def discriminant_scores(
    features: Float[Tensor, "batch features"], fitted: Discriminant
) -> Float[Tensor, "batch experts"]:
    """How much nearer a request is to an expert's prompts than to those of the experts around, less the border.

    The score of an expert is the logarithm of a ratio: the mean square of the distances to the `NEIGHBOURS` nearest
    other experts, by the square of the distance to this one. Distances are Mahalanobis distances by the covariance
    that prompts of one task have around their mean; of an expert of several tasks the nearest counts. Sources: linear
    discriminant analysis; the ratio test of nearest neighbours (Lowe 2004), with several neighbours.

    Args:
        features: one vector for each prompt.
        fitted: of `fit_discriminant`.

    Returns:
        Scores in float64; above 0, the expert fits.
    """
    distances = _distances(normalize(features.double(), dim=-1), fitted, fitted.num_experts)
    return _scores(distances, fitted.num_near) - fitted.border


def _fit(vectors: Tensor, kind_of_prompt: Tensor, owners: Tensor) -> Discriminant:
    """Means of the tasks that have prompts, and the whitening; without a border."""
    counts = kind_of_prompt.bincount(minlength=len(owners))
    sums = vectors.new_zeros(len(owners), vectors.shape[1]).index_add(0, kind_of_prompt, vectors)
    means = sums / counts[:, None]
    directions, isotropic = _whitening(vectors - means[kind_of_prompt], int((counts > 0).sum()))
    has_prompts = counts > 0
    kept = owners[has_prompts]
    return Discriminant(
        means[has_prompts], kept, directions, isotropic, isotropic.new_zeros(()), int(kept[-1]) + 1, len(kept.unique())
    )  # fmt: skip


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


def _distances(units: Tensor, fitted: Discriminant, num_experts: int) -> Tensor:
    """(batch, experts) squared Mahalanobis distances to the nearest task of each expert; infinite where it has none."""
    means, directions = fitted.means, fitted.directions
    plain, along = _squares(units, means), _squares(units @ directions, means @ directions)
    by_task = fitted.isotropic * plain - along
    nearest = by_task.new_full((len(units), num_experts), torch.inf)
    return nearest.scatter_reduce(1, fitted.owners.expand(len(units), -1), by_task, "amin")


def _squares(rows: Tensor, others: Tensor) -> Tensor:
    """(rows, others) squared distances, from differences: those of products would lose what is small."""
    return torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist").square()


def _scores(distances: Tensor, num_finite: int) -> Tensor:
    """(batch, experts) logarithms of the ratio; minus infinity for an expert that is infinitely far away.

    Args:
        distances: (batch, experts) squared.
        num_finite: how many of each row are finite. It is given, since a device would make the host wait for it.
    """
    smallest = torch.finfo(distances.dtype).tiny
    distances = distances.clamp_min(smallest)
    num_near = min(NEIGHBOURS, num_finite - 1)
    if num_near < 1:
        return -distances.log()
    near = distances.topk(num_near + 1, largest=False).values
    # Of an expert among the nearest the others are those; of one further away, the nearest without the last of them.
    others = torch.where(
        distances <= near[:, -1:], near.sum(dim=1, keepdim=True) - distances, near[:, :-1].sum(dim=1, keepdim=True)
    )
    return torch.where(distances.isinf(), -torch.inf, (others / num_near).clamp_min(smallest).log() - distances.log())
