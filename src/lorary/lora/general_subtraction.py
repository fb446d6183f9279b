"""General knowledge, taken from the mixture of the other experts.

General experts are seated beside the others, so their down-projections are in the low-rank buffer already: to take
their knowledge away is to give them negative weights. No weight of any expert is changed.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lorary.ops.choose import Mix


class DeltaSubtraction(nn.Module):
    """Experts as `ΔW_e - mean of ΔW_g` over the general ones: exact, whatever the ranks and gauges.

    Args:
        expert_of_rank: the seat that each rank belongs to.
        general: which seats are general.
        taken_from: which seats lose the general knowledge.
        num_general: how many general experts are named: one that lacks this layer is zero in the mean.
        dtype: of the buffer.
    """

    expert_of_rank: Tensor
    share: Tensor
    taken_from: Tensor

    def __init__(
        self,
        expert_of_rank: Int[Tensor, " ranks"],
        general: Bool[Tensor, " experts"],
        taken_from: Bool[Tensor, " experts"],
        num_general: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.register_buffer("expert_of_rank", expert_of_rank, persistent=False)
        self.register_buffer("share", -general.to(dtype) / num_general, persistent=False)
        self.register_buffer("taken_from", taken_from.to(dtype), persistent=False)

    def forward(
        self, z: Float[Tensor, "tokens ranks"], weights: Float[Tensor, "tokens experts"], mix: Mix
    ) -> Float[Tensor, "tokens ranks"]:
        """The weighed buffer; outputs are mixed, since factors of a difference have no common rank.

        Args:
            z: the low-rank buffer.
            weights: routing weights, 0 for general experts.
            mix: how experts are put together.
        """
        assert mix == "outputs"
        return z * self.by_expert(weights)[:, self.expert_of_rank]

    def by_expert(self, weights: Float[Tensor, "tokens experts"]) -> Float[Tensor, "tokens experts"]:
        """The weight with which each expert acts, general ones included."""
        return weights + (weights @ self.taken_from)[:, None] * self.share


class FactorSubtraction(nn.Module):
    """Experts as `(A_e - mean A_g, B_e - mean B_g)`: as PEFT does it, for experts of one rank.

    Which function that is depends on how each update is split into its factors.

    Args:
        general: which seats are general.
        taken_from: which seats lose the general knowledge.
        scalings: of each seat, folded into its lora_b.
    """

    general: Tensor
    share: Tensor
    taken_from: Tensor
    scalings: Tensor

    def __init__(
        self,
        general: Bool[Tensor, " experts"],
        taken_from: Bool[Tensor, " experts"],
        scalings: Float[Tensor, " experts"],
    ) -> None:
        super().__init__()
        is_general = general.to(scalings.dtype)
        self.register_buffer("general", is_general / is_general.sum(), persistent=False)
        # Of what is given to the mean of B_g; their own scalings are taken out again.
        self.register_buffer("share", -self.general / scalings.masked_fill(~general, 1.0), persistent=False)
        self.register_buffer("taken_from", taken_from.to(scalings.dtype), persistent=False)
        self.register_buffer("scalings", scalings, persistent=False)

    def forward(
        self, z: Float[Tensor, "tokens ranks"], weights: Float[Tensor, "tokens experts"], mix: Mix
    ) -> Float[Tensor, "tokens ranks"]:
        """The weighed buffer; arguments are those of `DeltaSubtraction.forward`."""
        by_expert = z.view(*weights.shape, -1)  # (tokens, experts, rank)
        mean_a = torch.einsum("ter,e->tr", by_expert, self.general)
        by_expert = by_expert - mean_a[:, None] * self.taken_from[:, None]
        if mix == "factors":
            by_expert = torch.einsum("ter,te->tr", by_expert, weights)[:, None]
        weighted = by_expert * weights[..., None]
        mean_b = torch.einsum("ter,e->tr", weighted, self.scalings * self.taken_from)
        return (weighted + mean_b[:, None] * self.share[:, None]).flatten(1)
