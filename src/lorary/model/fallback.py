"""Which of two answers a request that no expert fits: the mean of all experts, or the base in its own chat template."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from lorary.errors import LibraryError
from lorary.library.prepared import Prepared, group_key, load_prepared, save_prepared
from lorary.library.store import Library
from lorary.ops.upload import upload

# The name of the evidence in a library.
KIND = "fallback"
VECTORS, ADVANTAGES = "vectors", "advantages"
# How far, in unit vectors, the evidence of a prompt reaches (the deviation of a Gaussian kernel).
REACH = 0.4
# How many prompts' worth of evidence for "no difference" every request has: far from all prompts the base answers.
PRIOR = 1.0
# Nats per token by which the mean of all experts must be expected to be better.
MARGIN = 0.3
# Nats per token beyond which one prompt is no stronger evidence.
MOST = 1.0


@dataclass(frozen=True)
class Evidence:
    """How much better the mean of all experts was than the base, on prompts whose own expert was taken away.

    Args:
        vectors: (prompts, features), what each prompt looks like; see `lorary.model.features.mean_hidden`.
        advantages: (prompts,), nats per token by which the mean's loss on the answer was lower.
    """

    vectors: Float[Tensor, "prompts features"]
    advantages: Float[Tensor, " prompts"]

    def prefers_mean(self, requests: Float[Tensor, "batch features"]) -> Bool[Tensor, " batch"]:
        """Whether the mean of all experts is expected to answer a request better than the base.

        The expectation is a kernel regression over the prompts (Nadaraya 1964, Watson 1964) that is drawn to 0.

        Args:
            requests: vectors like those of the prompts, any float dtype, on the device of the evidence.
        """
        prompts = normalize(self.vectors.double(), dim=1)
        centre = prompts.mean(dim=0)
        prompts = normalize(prompts - centre, dim=1)
        units = normalize(normalize(requests.double(), dim=1) - centre, dim=1)
        near = torch.exp(-torch.cdist(units, prompts).square() / (2 * REACH**2))
        return near @ self.advantages.double().clamp(-MOST, MOST) / (PRIOR + near.sum(dim=1)) > MARGIN

    def to(self, device: torch.device) -> "Evidence":
        """The same on a device."""
        return Evidence(upload(self.vectors, device), upload(self.advantages, device))


def load_evidence(library: Library) -> Evidence | None:
    """What was measured for the experts that a library holds now; None where nothing was.

    Raises:
        LibraryError: if it is damaged.
    """
    names = library.names()
    stored = load_prepared(library, KIND, group_key(library, names)) if names else None
    if stored is None:
        return None
    vectors, advantages = (stored.tensors.get(name, torch.empty(())) for name in (VECTORS, ADVANTAGES))
    if vectors.dim() != 2 or advantages.shape != vectors.shape[:1]:
        raise LibraryError(
            f"the evidence in {library.path}/derived must hold a vector and a number for each prompt",
            found=f"shapes {tuple(vectors.shape)} and {tuple(advantages.shape)}",
            remedy=f"delete its folder {KIND}-*, then build or prepare the library again",
        )
    return Evidence(vectors, advantages)


def save_evidence(library: Library, evidence: Evidence, made_of: dict[str, object]) -> None:
    """Keep what was measured, for the experts that a library holds now.

    Args:
        library: where to.
        evidence: what was measured.
        made_of: what decided it: tasks, rows, template.

    Raises:
        LibraryError: if the library cannot be written.
    """
    tensors = {VECTORS: evidence.vectors.float(), ADVANTAGES: evidence.advantages.float()}
    save_prepared(library, KIND, group_key(library, library.names()), Prepared(tensors, made_of, {}))
