"""All experts of one linear layer as one gated LoRA."""

from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Mix = Literal["outputs", "factors"]


@runtime_checkable
class Gate(Protocol):
    """Turns what a layer sees into routing weights."""

    def __call__(self, projections: Tensor) -> Tensor:
        """(tokens, experts) projections on the prototypes -> (tokens, experts) routing weights."""


class GatedLora(nn.Module):
    """Experts of one linear layer, rank-concatenated, with a gate on the low-rank buffer.

    `z = x downᵀ` serves scoring and mixing at once: the first `ranks` columns are the experts' down-projections, the
    last `experts` columns the projections on the prototypes. The gate weighs z, and `up` expands it. Nothing of size
    (tokens, experts, d_out) ever exists. Ranks may differ between experts.

    Args:
        down: rank-concatenated lora_a, then one prototype per expert.
        up: rank-concatenated lora_b, transposed, scalings folded in.
        expert_of_rank: the seated expert (0..experts-1) that each rank belongs to.
    """

    down: Tensor
    up: Tensor
    expert_of_rank: Tensor

    def __init__(
        self,
        down: Float[Tensor, "rows d_in"],
        up: Float[Tensor, "ranks d_out"],
        expert_of_rank: Int[Tensor, " ranks"],
    ) -> None:
        super().__init__()
        # Not persistent: the state dict of the base model must stay the base model's.
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)
        self.register_buffer("expert_of_rank", expert_of_rank, persistent=False)
        self.num_ranks = int(up.shape[0])
        self.num_experts = int(down.shape[0]) - self.num_ranks
        self.mix: Mix = "outputs"
        self.gate: Gate | None = None
        self.fixed: Tensor | None = None
        self.recorders: list[Callable[[Tensor], None]] = []

    def route_by(self, gate: Gate, mix: Mix) -> None:
        """Let a gate weigh the experts for each token."""
        self.gate, self.fixed, self.mix = gate, None, mix

    def fix(self, weights: Float[Tensor, " experts"], mix: Mix) -> None:
        """Give the experts the same weights for every token; experts of weight zero cost nothing."""
        self.gate, self.mix = None, mix
        self.fixed = weights.to(dtype=self.up.dtype, device=self.up.device)

    def forward(self, x: Float[Tensor, "*batch d_in"], output: Float[Tensor, "*batch d_out"]) -> Tensor:
        """Add the weighted experts to a layer's output.

        Args:
            x: what the layer was given; computed in the dtype of the experts (float32, or float64 for such a base).
            output: what the layer computed.

        Returns:
            The sum, in the dtype of `output`.
        """
        if torch.is_autocast_enabled(x.device.type):  # scores in half precision would choose other experts
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x, output)
        tokens = x.reshape(-1, x.shape[-1]).to(self.down.dtype)
        delta = self._fixed(tokens) if self.gate is None else self._routed(tokens, x.shape[:-1])
        return output if delta is None else output + delta.view(output.shape).to(output.dtype)

    def _routed(self, tokens: Tensor, leading: torch.Size) -> Tensor:
        assert self.gate is not None
        z, projections = (tokens @ self.down.mT).split((self.num_ranks, self.num_experts), dim=-1)
        weights = self.gate(projections)  # (tokens, experts)
        for record in self.recorders:
            record(weights.detach().view(*leading, -1))
        return _mix(z, weights[:, self.expert_of_rank], self.num_experts, self.mix) @ self.up

    def _fixed(self, tokens: Tensor) -> Tensor | None:
        if self.fixed is None or not bool(self.fixed.any()):
            return None
        by_rank = self.fixed[self.expert_of_rank]  # (ranks,)
        rows = by_rank.nonzero().squeeze(1)
        z = tokens @ self.down[rows].mT
        return _mix(z, by_rank[rows].expand_as(z), int(self.fixed.count_nonzero()), self.mix) @ self.up[rows]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "GatedLora":
        # Experts follow the base to its device, but keep their dtype: scores in bfloat16 would choose other experts.
        for name, buffer in self._buffers.items():
            if buffer is not None:
                device = fn(torch.empty(0, dtype=buffer.dtype, device=buffer.device)).device
                self._buffers[name] = buffer.to(device)
        if self.fixed is not None:
            self.fixed = self.fixed.to(self.up.device)
        return self


def _mix(
    z: Float[Tensor, "tokens ranks"], by_rank: Float[Tensor, "tokens ranks"], num_experts: int, mix: Mix
) -> Float[Tensor, "tokens ranks"]:
    """Weigh the low-rank buffer so that expanding it gives the mixture.

    Outputs: `sum_e w_e B_e A_e x`. Factors: `(sum_e w_e B_e) (sum_f w_f A_f) x`, for experts of one rank: the buffer
    becomes w_e times the mean of all experts' z, since `sum_f w_f A_f x` is what every B_e is applied to.
    """
    weighted = z * by_rank
    if mix == "outputs":
        return weighted
    mean = weighted.view(z.shape[0], num_experts, -1).sum(dim=1)  # (tokens, rank)
    return by_rank * mean.repeat(1, num_experts)
