"""All experts of one linear layer as one gated LoRA."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorary.lora.rows import append_rows, remove_rows

Mix = Literal["outputs", "factors"]


class Seen(NamedTuple):
    """What a layer was given, as far as a gate may look.

    Args:
        x: (tokens, d_in), in the dtype of the experts.
        z: (tokens, ranks), the experts' down-projections.
        projections: (tokens, experts), products with the prototypes, for a gate that reads them.
        leading: the axes of the tokens before they were flattened, (batch, seq) in most models.
    """

    x: Tensor
    z: Tensor
    projections: Tensor | None
    leading: torch.Size


@runtime_checkable
class Gate(Protocol):
    """Turns what a layer sees into routing weights."""

    @property
    def reads_prototypes(self) -> bool:
        """Whether the gate wants products with the prototypes; the others come from z and cost no rows."""

    def __call__(self, seen: Seen) -> Tensor | None:
        """(tokens, experts) routing weights, or None to leave the layer's output as it is."""


class GatedLora(nn.Module):
    """Experts of one linear layer, rank-concatenated, with a gate on the low-rank buffer.

    `z = x downᵀ` serves scoring and mixing at once: the first `ranks` columns are the experts' down-projections, the
    last `experts` columns the projections on the prototypes. The gate weighs z, and `up` expands it. Nothing of size
    (tokens, experts, d_out) ever exists. Ranks may differ between experts.

    Args:
        down: rank-concatenated lora_a, then one prototype per expert.
        up: rank-concatenated lora_b, transposed, scalings folded in.
        expert_of_rank: the seated expert (0..experts-1) that each rank belongs to, ascending.
    """

    down: Tensor
    up: Tensor
    expert_of_rank: Tensor
    fixed: Tensor | None
    fixed_by_rank: Tensor | None
    fixed_down: Tensor | None
    fixed_up: Tensor | None

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
        for name in ("fixed", "fixed_by_rank", "fixed_down", "fixed_up"):
            self.register_buffer(name, None, persistent=False)
        self.mix: Mix = "outputs"
        self.gate: Gate | None = None
        self.general: nn.Module | None = None
        self.num_fixed = 0
        self.recorders: list[Callable[[Tensor], None]] = []

    @property
    def num_ranks(self) -> int:
        """Rows of `up`: the ranks of all experts."""
        return int(self.up.shape[0])

    @property
    def num_experts(self) -> int:
        """Experts seated in this layer."""
        return int(self.down.shape[0]) - self.num_ranks

    def route_by(self, gate: Gate, mix: Mix, general: nn.Module | None = None) -> None:
        """Let a gate weigh the experts for each token, and general experts be taken from them (`lora/general.py`)."""
        self.gate, self.mix, self.general = gate, mix, general
        self.fixed = self.fixed_by_rank = self.fixed_down = self.fixed_up = None

    def fix(self, weights: Float[Tensor, " experts"], mix: Mix) -> None:
        """Give the experts the same weights for every token; experts of weight zero cost nothing."""
        self.gate, self.mix, self.general = None, mix, None
        self.fixed = weights.to(dtype=self.up.dtype, device=self.up.device)
        by_rank = self.fixed[self.expert_of_rank]
        rows = by_rank.nonzero().squeeze(1)
        # Gathered once, and not for every token that comes; all of them need no copy.
        is_all = len(rows) == self.num_ranks
        self.num_fixed = int(self.fixed.count_nonzero())
        self.fixed_by_rank = by_rank[rows]
        self.fixed_down = self.down[: self.num_ranks] if is_all else self.down[rows]
        self.fixed_up = self.up if is_all else self.up[rows]

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

    def _routed(self, tokens: Tensor, leading: torch.Size) -> Tensor | None:
        assert self.gate is not None
        z, projections = self._shrink(tokens, self.gate.reads_prototypes)
        weights = self.gate(Seen(tokens, z, projections, leading))  # (tokens, experts)
        if weights is None:
            return None
        for record in self.recorders:
            record(weights.detach().view(*leading, -1))
        if self.general is not None:
            weighed: Tensor = self.general(z, weights, self.mix)
            return weighed @ self.up
        return _mix(z, weights[:, self.expert_of_rank], self.num_experts, self.mix) @ self.up

    def _shrink(self, tokens: Tensor, with_prototypes: bool) -> tuple[Tensor, Tensor | None]:
        if not with_prototypes:
            return tokens @ self.down[: self.num_ranks].mT, None
        z, projections = (tokens @ self.down.mT).split((self.num_ranks, self.num_experts), dim=-1)
        return z, projections

    def _fixed(self, tokens: Tensor) -> Tensor | None:
        by_rank, down, up = self.fixed_by_rank, self.fixed_down, self.fixed_up
        if by_rank is None or down is None or up is None or not len(by_rank):
            return None
        z = tokens @ down.mT
        return _mix(z, by_rank.expand_as(z), self.num_fixed, self.mix) @ up

    def append(
        self,
        lora_a: Float[Tensor, "rank d_in"],
        prototype: Float[Tensor, " d_in"],
        up: Float[Tensor, "rank d_out"],
    ) -> None:
        """Seat one more expert, behind the others; a router must be given again before the next token.

        Args:
            lora_a: its down-projection.
            prototype: its prototype.
            up: its lora_b, transposed, scaling folded in.
        """
        self._stop()
        num_ranks, num_experts, rank = self.num_ranks, self.num_experts, len(lora_a)
        prototypes = self.down[num_ranks:].clone()
        self.down = append_rows(self.down, self.down.new_zeros(rank + 1, self.down.shape[1]))
        self.down[num_ranks : num_ranks + rank] = lora_a
        self.down[num_ranks + rank : -1] = prototypes
        self.down[-1] = prototype
        self.up = append_rows(self.up, up.to(self.up))
        own = torch.full((rank,), num_experts, device=self.up.device)
        self.expert_of_rank = torch.cat([self.expert_of_rank, own])

    def remove(self, expert: int, start: int, stop: int) -> None:
        """Take one expert away; a router must be given again before the next token.

        Args:
            expert: its position.
            start: its first rank.
            stop: the first rank behind it.
        """
        self._stop()
        row = self.num_ranks + expert
        self.down = remove_rows(remove_rows(self.down, row, row + 1), start, stop)
        self.up = remove_rows(self.up, start, stop)
        others = torch.cat([self.expert_of_rank[:start], self.expert_of_rank[stop:]])
        self.expert_of_rank = others - (others > expert).to(others.dtype)

    def _stop(self) -> None:
        """Drop what the router in force keeps of the experts that are about to change."""
        self.gate = self.general = None
        self.fixed = self.fixed_by_rank = self.fixed_down = self.fixed_up = None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "GatedLora":
        # Experts follow the base to its device, but keep their dtype: scores in bfloat16 would choose other experts.
        is_all = self.fixed_up is self.up
        for module in self.modules():  # the gate too
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    device = fn(torch.empty(0, dtype=buffer.dtype, device=buffer.device)).device
                    module._buffers[name] = buffer.to(device)
        if is_all:  # one copy, not two
            self.fixed_down, self.fixed_up = self.down[: self.num_ranks], self.up
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
