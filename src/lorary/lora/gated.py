"""All experts of one linear layer as one gated LoRA."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorary.lora.gate import Gate, Seen
from lorary.ops.choose import Chosen
from lorary.ops.growable import append_rows, remove_rows
from lorary.ops.mix import Mix, mix_chosen, weigh
from lorary.ops.native import FEW_TOKENS, MOST_CHOSEN, NativeRoute, Quick, is_native, is_watched, native_mix

# The choice of fewer than one in so many experts is applied by itself; of more, all are computed.
SPARSE = 2


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
    starts: Tensor
    rows: Tensor
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
        self._index()
        for name in ("fixed", "fixed_by_rank", "fixed_down", "fixed_up"):
            self.register_buffer(name, None, persistent=False)
        self.mix: Mix = "outputs"
        self.gate: Gate | None = None
        self.general: nn.Module | None = None
        self.num_fixed = 0
        self.at_once: NativeRoute | None = None
        self.recorders: list[Callable[[Tensor], None]] = []

    @property
    def num_ranks(self) -> int:
        """Rows of `up`: the ranks of all experts."""
        return int(self.up.shape[0])

    @property
    def num_experts(self) -> int:
        """Experts seated in this layer."""
        return int(self.down.shape[0]) - self.num_ranks

    @property
    def prototypes(self) -> Tensor:
        """(experts, d_in), in the order of the seats."""
        return self.down[self.num_ranks :]

    def route_by(self, gate: Gate, mix: Mix, general: nn.Module | None = None) -> None:
        """Let a gate weigh the experts for each token, and general experts be taken from them (`lora/general.py`)."""
        self._stop()
        self.gate, self.mix, self.general = gate, mix, general

    def fix(self, weights: Float[Tensor, " experts"], mix: Mix) -> None:
        """Give the experts the same weights for every token; experts of weight zero cost nothing."""
        self._stop()
        self.mix = mix
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
        if self._is_at_once(x, output):
            assert self.at_once is not None
            return self.at_once(x, output)
        if torch.is_autocast_enabled(x.device.type):  # scores in half precision would choose other experts
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x, output)
        tokens = x.reshape(-1, x.shape[-1]).to(self.down.dtype)
        if self.gate is None:
            delta = self._fixed(tokens)
        elif self._is_native(tokens, output):
            return self._routed_natively(self.gate, tokens, x.shape[:-1], output)
        else:
            delta = self._routed(self.gate, tokens, x.shape[:-1])
        return output if delta is None else output + delta.view(output.shape).to(output.dtype)

    def _is_at_once(self, x: Tensor, output: Tensor) -> bool:
        if torch.compiler.is_compiling() or self.at_once is None or self.recorders:
            return False
        up = self._buffers["up"]
        assert up is not None
        return self.at_once.down is self._buffers["down"] and self.at_once.takes(x, output, up)

    def _is_native(self, tokens: Tensor, output: Tensor) -> bool:
        """Whether compiled code may apply the experts: nobody follows them, and dense products would not be faster."""
        if torch.compiler.is_compiling() or not self._is_plain:
            return False
        if not (is_native(tokens) and is_native(self.down) and is_native(self.up)):
            return False
        assert self.gate is not None
        quick = self.gate.quick
        if not output.is_cpu or is_watched(tokens, output, self.down, self.up, *(quick[:2] if quick else ())):
            return False
        is_sparse = self.gate.most * SPARSE <= self.num_experts or len(tokens) <= FEW_TOKENS
        return is_sparse and self.gate.most <= MOST_CHOSEN

    def _routed_natively(self, gate: Gate, tokens: Tensor, leading: torch.Size, output: Tensor) -> Tensor:
        tokens, quick = tokens.contiguous(), gate.quick
        base = output.reshape(-1, output.shape[-1]).contiguous()
        if base.dtype != tokens.dtype:
            base = torch.zeros_like(base, dtype=tokens.dtype)
        if quick is not None:
            quick = quick._replace(rows=self.prototypes) if gate.reads_prototypes else quick
            out = self._quickly(quick, tokens, leading, base)
        else:
            z, projections = self._shrink(tokens, gate)
            chosen = gate(Seen(tokens, z, projections, leading))
            if chosen is None:
                return output
            self._record(chosen, leading)
            if chosen.weights.requires_grad:  # of a gate that is trained
                return output + mix_chosen(tokens, chosen, self.down, self.up, self.rows).view(output.shape).to(output)
            out = native_mix(tokens, chosen, self.down, self.up, self.starts, base, z)
        out = out.view(output.shape)
        return out if out.dtype == output.dtype else output + out.to(output.dtype)

    def _quickly(self, quick: Quick, tokens: Tensor, leading: torch.Size, base: Tensor) -> Tensor:
        route = self.at_once = NativeRoute(quick, self.down, self.up, self.starts)
        chosen = route.room(len(tokens)) if self.recorders else None
        out = route(tokens, base, None if len(tokens) <= FEW_TOKENS else tokens @ route.read.mT, chosen)
        if chosen is not None:
            self._record(chosen, leading)
        return out

    def _routed(self, gate: Gate, tokens: Tensor, leading: torch.Size) -> Tensor | None:
        z, projections = self._shrink(tokens, gate, all_z=not self._is_gathered(gate, len(tokens)))
        chosen = gate(Seen(tokens, z, projections, leading))
        if chosen is None:
            return None
        self._record(chosen, leading)
        if z is None:
            return mix_chosen(tokens, chosen, self.down, self.up, self.rows)
        weights = chosen.dense(self.num_experts)  # (tokens, experts)
        if self.general is not None:
            weighed: Tensor = self.general(z, weights, self.mix)
            return weighed @ self.up
        return weigh(z, weights[:, self.expert_of_rank], self.num_experts, self.mix) @ self.up

    def _is_gathered(self, gate: Gate, num_tokens: int) -> bool:
        """Whether the rows of the chosen, read for each token, are fewer than all that there are."""
        num_rows = num_tokens * gate.most * self.rows.shape[1]
        return self._is_plain and not gate.reads_z and num_rows <= self.num_ranks

    @property
    def _is_plain(self) -> bool:
        """Whether the mixture is the weighted sum of the chosen experts' outputs, so that no other plays a part."""
        return self.mix == "outputs" and self.general is None

    def _record(self, chosen: Chosen, leading: torch.Size) -> None:
        for record in self.recorders:
            record(chosen.dense(self.num_experts).detach().view(*leading, -1))

    def _shrink(self, tokens: Tensor, gate: Gate, *, all_z: bool = False) -> tuple[Tensor | None, Tensor | None]:
        """The down-projections and the products with the prototypes, in one product, where gate or plan need them."""
        if not (all_z or gate.reads_z):
            return None, tokens @ self.prototypes.mT if gate.reads_prototypes else None
        if not gate.reads_prototypes:
            return tokens @ self.down[: self.num_ranks].mT, None
        z, projections = (tokens @ self.down.mT).split((self.num_ranks, self.num_experts), dim=-1)
        return z, projections

    def _fixed(self, tokens: Tensor) -> Tensor | None:
        by_rank, down, up = self.fixed_by_rank, self.fixed_down, self.fixed_up
        if by_rank is None or down is None or up is None or not len(by_rank):
            return None
        z = tokens @ down.mT
        return weigh(z, by_rank[None], self.num_fixed, self.mix) @ up

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
        self._index()

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
        self._index()

    def _index(self) -> None:
        """Where the ranks of each expert lie: the first of each, and all of them."""
        sizes = self.expert_of_rank.bincount(minlength=self.num_experts)
        starts = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        ranks = torch.arange(int(sizes.max()), device=sizes.device)
        self.register_buffer("starts", starts, persistent=False)
        rows = (starts[:-1, None] + ranks).masked_fill(ranks >= sizes[:, None], -1)
        self.register_buffer("rows", rows, persistent=False)

    def _stop(self) -> None:
        """Drop the router in force, and what it keeps of the experts."""
        self.gate = self.general = self.at_once = None
        self.fixed = self.fixed_by_rank = self.fixed_down = self.fixed_up = None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "GatedLora":
        # Experts follow the base to its device, but keep their dtype: scores in bfloat16 would choose other experts.
        is_all = self.fixed_up is self.up
        self.at_once = None
        for module in self.modules():  # the gate too
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    device = fn(torch.empty(0, dtype=buffer.dtype, device=buffer.device)).device
                    module._buffers[name] = buffer.to(device)
        if is_all:  # one copy, not two
            self.fixed_down, self.fixed_up = self.down[: self.num_ranks], self.up
        return self
