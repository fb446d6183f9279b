"""Fixed weights: experts named by the caller, the same for every token and layer (the oracle is one such choice)."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.errors import RouterError, did_you_mean


def fixed_weights(experts: Sequence[str], chosen: Mapping[str, float]) -> Float[Tensor, " experts"]:
    """The given weight for each named expert, zero for the others.

    Args:
        experts: names of all experts of the library.
        chosen: weight by name; one expert with weight 1 is plain LoRA inference.

    Returns:
        Weights in float64.

    Raises:
        RouterError: if a name is not in the library, or a weight is not finite.
    """
    for name, weight in chosen.items():
        if name not in experts:
            raise RouterError(
                "a named expert must be in the library",
                found=name,
                remedy=did_you_mean(name, experts, remedy=f"it has {list(experts)}"),
            )
        if weight != weight or abs(weight) == float("inf"):
            raise RouterError(f"the weight of expert '{name}' must be finite", found=weight)
    return torch.tensor([float(chosen.get(name, 0.0)) for name in experts], dtype=torch.float64)
