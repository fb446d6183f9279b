"""All experts of one linear layer as one gated LoRA: what is stored, and which plan computes it."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorary.lora import plans
from lorary.lora.context import Local, innermost
from lorary.lora.fused import is_fusable
from lorary.lora.gate import Gate, LayerInput
from lorary.lora.general_subtraction import DeltaSubtraction
from lorary.ops.choose import Chosen, Mix
from lorary.ops.growable import append_rows, remove_rows
from lorary.ops.native import FEW_TOKENS, MOST_CHOSEN, NativeMix, NativeRoute, Quick, is_native, is_watched

# The choice of fewer than one in so many experts is applied by itself; of more, all are computed.
SPARSE = 2
# The experts themselves, which the modules of all blocks share.
_EXPERTS = ("down", "up", "expert_of_rank", "starts", "rank_index", "offset", "gain")


class GatedLora(nn.Module):
    """Experts of one linear layer, rank-concatenated, with a gate on the low-rank buffer.

    `z = x downᵀ` serves scoring and mixing at once: the first `ranks` columns are the experts' down-projections, the
    last `experts` columns the projections on the prototypes. Ranks may differ between experts.

    A `with lorary.routing` block routes the same experts by a module of its own, which stands in for this one in the
    thread or task that entered the block (`lorary.lora.context`) and is no part of the model.

    An expert may add more than its factors do: an offset, the same for every token, and a gain times what the layer
    itself computed. Few libraries have such experts, and layers without one pay nothing for it.

    Args:
        down: rank-concatenated lora_a, then one prototype per expert.
        up: rank-concatenated lora_b, transposed, scalings folded in.
        expert_of_rank: the seated expert (0..experts-1) that each rank belongs to, ascending.
        offset: of each expert; None where no expert has one.
        gain: likewise.
    """

    down: Tensor
    up: Tensor
    expert_of_rank: Tensor
    starts: Tensor
    rank_index: Tensor
    offset: Tensor | None
    gain: Tensor | None
    fixed: Tensor | None
    fixed_by_rank: Tensor | None
    fixed_down: Tensor | None
    fixed_up: Tensor | None
    fixed_offset: Tensor | None
    fixed_gain: Tensor | None

    def __init__(
        self,
        down: Float[Tensor, "rows d_in"],
        up: Float[Tensor, "ranks d_out"],
        expert_of_rank: Int[Tensor, " ranks"],
        offset: Float[Tensor, "experts d_out"] | None = None,
        gain: Float[Tensor, "experts d_out"] | None = None,
    ) -> None:
        super().__init__()
        # Not persistent: the state dict of the base model must stay the base model's.
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)
        self.register_buffer("expert_of_rank", expert_of_rank, persistent=False)
        self._index()
        self.set_beside(offset, gain)
        for name in ("fixed", "fixed_by_rank", "fixed_down", "fixed_up", "fixed_offset", "fixed_gain"):
            self.register_buffer(name, None, persistent=False)
        self.mix: Mix = "outputs"
        self.gate: Gate | None = None
        self.general: nn.Module | None = None
        self.num_fixed = 0
        self.is_fused = False
        self.at_once: NativeMix | NativeRoute | None = None
        self.recorders: list[Callable[[Tensor], None]] = []
        self.held: dict[int, GatedLora] = {}
        self.is_open = True
        self.entered: Local[tuple[GatedLora, ...]] = Local(tuple)

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

    def set_beside(
        self, offset: Float[Tensor, "experts d_out"] | None, gain: Float[Tensor, "experts d_out"] | None
    ) -> None:
        """Say what experts add beside their factors; a router must be given again before the next token."""
        self.register_buffer("offset", offset, persistent=False)
        self.register_buffer("gain", gain, persistent=False)
        self.has_beside = offset is not None or gain is not None  # a plain attribute: it is asked for in every layer

    @property
    def in_force(self) -> "GatedLora":
        """This module, or the one of the innermost block that the running thread or task stands in."""
        if torch.compiler.is_compiling():  # compiled code is told apart by what is local to a thread, and by no context
            entered = [lora for lora in self.entered.value if lora.is_open]
            return entered[-1] if entered else self
        return innermost(self.held, self)

    def beside(self) -> "GatedLora":
        """A module for a block: the same experts, to be routed otherwise."""
        other = GatedLora.__new__(GatedLora)
        vars(other).update(vars(self), _buffers=dict(self._buffers), _modules=dict(self._modules), held={})
        vars(other).pop("forward", None)  # accelerate's: it calls the module that it was put on
        return other

    def hold(self, block: int, lora: "GatedLora") -> None:
        """Let a module made by `beside` stand in for this one inside a block."""
        self.held[block] = lora
        self._enter(lora)

    def release(self, block: int) -> None:
        """End that."""
        self.held.pop(block).is_open = False
        self._enter()

    def _enter(self, *new: "GatedLora") -> None:
        self.entered.value = (*(lora for lora in self.entered.value if lora.is_open), *new)

    def extra_repr(self) -> str:
        """Its sizes, for whoever prints the model."""
        return f"experts={self.num_experts}, ranks={self.num_ranks}, mix={self.mix}"

    def route_by(self, gate: Gate, mix: Mix, general: nn.Module | None = None, *, is_fused: bool = False) -> None:
        """Let a gate weigh the experts of each token.

        Args:
            gate: weighs them.
            mix: how they are put together.
            general: takes general experts from them (see its module).
            is_fused: use the fused plan where it can run.
        """
        self._stop()
        self.gate, self.mix, self.general, self.is_fused = gate, mix, general, is_fused

    def fix(self, weights: Float[Tensor, " experts"], mix: Mix) -> None:
        """Give the experts the same weights for every token; experts of weight zero cost nothing."""
        self._stop()
        self.mix = mix
        self.fixed = weights.to(dtype=self.up.dtype, device=self.up.device)
        self.num_fixed = int(self.fixed.count_nonzero())
        by_rank = self.fixed[self.expert_of_rank]
        ranks = by_rank.nonzero().squeeze(1)
        self.fixed_by_rank = by_rank[ranks]
        if len(ranks) < self.num_ranks:  # copied once, and not for every token that comes; all of them need no copy
            self.fixed_down, self.fixed_up = self.down[ranks], self.up[ranks]
        self.fixed_offset, self.fixed_gain = (
            rows if rows is None else (self.fixed @ rows)[None] for rows in (self.offset, self.gain)
        )

    def forward(self, x: Float[Tensor, "*batch d_in"], output: Float[Tensor, "*batch d_out"]) -> Tensor:
        """Add the weighted experts to a layer's output.

        Args:
            x: what the layer was given; computed in the dtype of the experts (float32, or float64 for such a base).
            output: what the layer computed.

        Returns:
            The sum, in the dtype of `output`.
        """
        # Compiled code must not look at the numbers of blocks: each block would be compiled anew.
        if torch.compiler.is_compiling():
            return self.in_force._add(x, output)
        lora = innermost(self.held, self) if self.held else self
        if lora is not self:
            self._lend(lora)
        at_once = lora.at_once  # looked up once: another thread may put its own there
        if at_once is not None and lora._is_right(at_once, x, output):
            return at_once(x, output)
        return lora._add(x, output)

    def _add(self, x: Tensor, output: Tensor) -> Tensor:
        kind = x.device.type
        # Scores in half precision would choose other experts. Not every device knows autocast.
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return self._add(x, output)
        tokens, gate = x.reshape(-1, x.shape[-1]), self.gate
        is_asked = self.is_fused and self._is_plain and not self.has_beside
        if is_asked and gate is not None and is_fusable(gate, tokens, output, self.down, self.up):
            return self._fused(gate, tokens, x.shape[:-1], output)
        tokens = tokens.to(self.down.dtype)
        if gate is not None:
            return self._routed(gate, tokens, x.shape[:-1], output)
        if self.fixed_by_rank is None or not self.num_fixed:
            return output
        return self._fixed(tokens, x.shape[:-1], output)

    def _is_right(self, at_once: NativeMix | NativeRoute, x: Tensor, output: Tensor) -> bool:
        if self.recorders or at_once.down is not self._buffers["down"]:
            return False
        decided = self.fixed if self.gate is None else self.gate.decided
        if isinstance(at_once, NativeMix) and not at_once.is_of(decided, x):
            return False
        up = self._buffers["up"]
        assert up is not None
        return at_once.takes(x, output, up)

    def _fixed(self, tokens: Tensor, leading: torch.Size, output: Tensor) -> Tensor:
        is_bare = not (self.recorders or self.has_beside)
        if is_bare and len(tokens) <= FEW_TOKENS and self._is_compiled(self.num_fixed, tokens, output):
            assert self.fixed is not None
            chosen = Chosen(*(part.repeat(len(tokens), 1) for part in Chosen.of(self.fixed)))
            return self._mixed_at_once(chosen, self.fixed, tokens.contiguous(), leading, output)
        down, up, by_rank = self.fixed_down, self.fixed_up, self.fixed_by_rank
        assert by_rank is not None
        down, up = (self.down[: self.num_ranks], self.up) if down is None or up is None else (down, up)
        delta = plans.fixed(tokens, down, up, by_rank, self.num_fixed, self.mix)
        if self.has_beside:
            delta = plans.beside(delta, output, self.fixed_offset, self.fixed_gain)
        return _plus(output, delta)

    def _fused(self, gate: Gate, tokens: Tensor, leading: torch.Size, output: Tensor) -> Tensor:
        from lorary.lora.fused_kernels import expand, shrink  # not at the top: they import Triton

        z, projections = shrink(tokens, self.down).split((self.num_ranks, self.num_experts), dim=-1)
        chosen = gate(LayerInput(tokens, z, projections, leading))
        if chosen is None:
            return output
        self._record(chosen, leading)
        base = output.reshape(-1, output.shape[-1])
        return expand(z, *chosen, self.up, self.expert_of_rank, base).view(output.shape)

    def _routed(self, gate: Gate, tokens: Tensor, leading: torch.Size, output: Tensor) -> Tensor:
        quick = None if torch.compiler.is_compiling() else gate.quick
        is_compiled = self._is_compiled(gate.most, tokens, output, *(quick[:2] if quick else ()))
        if is_compiled:
            tokens = tokens.contiguous()
            if quick is not None:
                quick = quick._replace(score_rows=self.prototypes) if gate.reads_prototypes else quick
                return self._compiled_at_once(quick, tokens, leading, output)
        is_dense = not (is_compiled or self._is_gathered(gate, len(tokens)))
        z, projections = self._shrink(tokens, gate, all_z=is_dense)
        chosen = gate(LayerInput(tokens, z, projections, leading))
        if chosen is None:
            return output
        self._record(chosen, leading)
        if is_dense:
            assert z is not None
            delta = plans.dense(z, chosen, self.up, self.expert_of_rank, self.num_experts, self.mix, self.general)
            return _plus(output, self._with_beside(delta, output, chosen))
        if is_compiled and not chosen.weights.requires_grad:  # else the gate is trained
            decided = None if self.has_beside else gate.decided
            if decided is not None and len(tokens) <= FEW_TOKENS:
                return self._mixed_at_once(chosen, decided, tokens, leading, output)
            total = plans.compiled(tokens, chosen, self.down, self.up, self.starts, z, output)
            return self._total_with_beside(total, output, chosen)
        delta = plans.gathered(tokens, chosen, self.down, self.up, self.rank_index)
        return _plus(output, self._with_beside(delta, output, chosen))

    def _with_beside(self, delta: Tensor, output: Tensor, chosen: Chosen) -> Tensor:
        """What the experts of each token compute, given what their factors do."""
        if not self.has_beside:
            return delta
        if self.general is not None:
            assert isinstance(self.general, DeltaSubtraction)
            weights = self.general.by_expert(chosen.dense(self.num_experts))
            chosen = Chosen(torch.arange(self.num_experts, device=weights.device).expand_as(weights), weights)
        offset, gain = (rows if rows is None else plans.mixed_rows(chosen, rows) for rows in (self.offset, self.gain))
        return plans.beside(delta, output, offset, gain)

    def _total_with_beside(self, total: Tensor, output: Tensor, chosen: Chosen) -> Tensor:
        """The same, given the layer's output with what their factors do."""
        if not self.has_beside:
            return total
        delta = total.reshape(-1, total.shape[-1]).to(self.up.dtype)
        return self._with_beside(delta, output, chosen).view(output.shape).to(output.dtype)

    def _mixed_at_once(
        self, chosen: Chosen, decided: object, tokens: Tensor, leading: torch.Size, output: Tensor
    ) -> Tensor:
        chosen = Chosen(*(part.contiguous() for part in chosen))
        self.at_once = NativeMix(chosen, decided, leading, self.down, self.up, self.starts)
        return plans.compiled(tokens, chosen, self.down, self.up, self.starts, None, output)

    def _is_compiled(self, most: int, tokens: Tensor, output: Tensor, *more: Tensor | None) -> bool:
        """Whether compiled code may apply the experts: nobody follows them, and dense products would not be faster."""
        if torch.compiler.is_compiling() or not self._is_plain:
            return False
        if not (is_native(tokens) and is_native(self.down) and is_native(self.up)):
            return False
        if not output.is_cpu or is_watched(tokens, output, self.down, self.up, *more):
            return False
        is_sparse = most * SPARSE <= self.num_experts or len(tokens) <= FEW_TOKENS
        return is_sparse and most <= MOST_CHOSEN

    def _compiled_at_once(self, quick: Quick, tokens: Tensor, leading: torch.Size, output: Tensor) -> Tensor:
        route = NativeRoute(quick, self.down, self.up, self.starts)
        self.at_once = None if self.has_beside else route  # it adds what the factors do, and no more
        chosen = route.room(len(tokens)) if self.recorders or self.has_beside else None
        total = plans.compiled_at_once(route, tokens, output, chosen)
        if chosen is None:
            return total
        self._record(chosen, leading)
        return self._total_with_beside(total, output, chosen)

    def _is_gathered(self, gate: Gate, num_tokens: int) -> bool:
        """Whether the ranks of the chosen, read for each token, are fewer than all that there are."""
        num_read = num_tokens * gate.most * self.rank_index.shape[1]
        return self._is_plain and not gate.reads_z and num_read <= self.num_ranks

    @property
    def _is_plain(self) -> bool:
        """Whether the mixture is the weighted sum of the chosen experts' outputs, so that no other plays a part."""
        return self.mix == "outputs" and self.general is None

    def _record(self, chosen: Chosen, leading: torch.Size) -> None:
        for record in tuple(self.recorders):  # another thread may end its trace
            record(chosen.dense(self.num_experts).detach().view(*leading, -1))

    def _shrink(self, tokens: Tensor, gate: Gate, *, all_z: bool = False) -> tuple[Tensor | None, Tensor | None]:
        """The down-projections and the products with the prototypes, in one product, where gate or plan need them."""
        if not (all_z or gate.reads_z):
            return None, tokens @ self.prototypes.mT if gate.reads_prototypes else None
        if not gate.reads_prototypes:
            return tokens @ self.down[: self.num_ranks].mT, None
        z, projections = (tokens @ self.down.mT).split((self.num_ranks, self.num_experts), dim=-1)
        return z, projections

    def append(
        self,
        lora_a: Float[Tensor, "rank d_in"],
        prototype: Float[Tensor, " d_in"],
        up: Float[Tensor, "rank d_out"],
    ) -> None:
        """Seat one more expert, behind the others; a router must be given again before the next token.

        What it adds beside its factors is said by `set_beside`.

        Args:
            lora_a: its down-projection.
            prototype: its prototype.
            up: its lora_b, transposed, scaling folded in.
        """
        self._stop()
        num_ranks, num_experts, rank = self.num_ranks, self.num_experts, len(lora_a)
        prototypes = self.prototypes.clone()
        self.down = append_rows(self.down, self.down.new_zeros(rank + 1, self.down.shape[1]))
        self.down[num_ranks : num_ranks + rank] = lora_a
        self.down[num_ranks + rank : -1] = prototypes
        self.down[-1] = prototype
        self.up = append_rows(self.up, up.to(self.up))
        self.expert_of_rank = torch.cat([self.expert_of_rank, self.expert_of_rank.new_full((rank,), num_experts)])
        self._index()

    def remove(self, expert: int, start: int, stop: int) -> None:
        """Take one expert away; a router must be given again before the next token.

        What the others add beside their factors is said by `set_beside`.

        Args:
            expert: its position.
            start: its first rank.
            stop: the first rank behind it.
        """
        self._stop()
        prototype = self.num_ranks + expert
        self.down = remove_rows(remove_rows(self.down, prototype, prototype + 1), start, stop)
        self.up = remove_rows(self.up, start, stop)
        remaining = torch.cat([self.expert_of_rank[:start], self.expert_of_rank[stop:]])
        self.expert_of_rank = remaining - (remaining > expert).to(remaining.dtype)
        self._index()

    def _index(self) -> None:
        """Where the ranks of each expert lie: the first of each, and all of them."""
        sizes = self.expert_of_rank.bincount(minlength=self.num_experts)
        starts = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        ranks = torch.arange(int(sizes.max()), device=sizes.device)
        self.register_buffer("starts", starts, persistent=False)
        rank_index = (starts[:-1, None] + ranks).masked_fill(ranks >= sizes[:, None], -1)
        self.register_buffer("rank_index", rank_index, persistent=False)

    def _stop(self) -> None:
        """Drop the router in force, and what it keeps of the experts."""
        self.gate = self.general = self.at_once = None
        self.is_fused = False
        self.fixed = self.fixed_by_rank = self.fixed_down = self.fixed_up = self.fixed_offset = self.fixed_gain = None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "GatedLora":
        # Experts follow the base to its device, but keep their dtype: scores in bfloat16 would choose other experts.
        self.at_once = None  # it keeps where the tensors lay
        for module in self.modules():  # the gate too
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    device = fn(torch.empty(0, dtype=buffer.dtype, device=buffer.device)).device
                    module._buffers[name] = buffer.to(device)
        for lora in self.held.values():
            self._lend(lora)
            lora._apply(fn)
        return self

    def _lend(self, lora: "GatedLora") -> None:
        """Give a block's module the experts that are here now: `torch.func` puts others in their place."""
        experts, borrowed = self._buffers, lora._buffers
        if experts["down"] is not borrowed["down"] or experts["up"] is not borrowed["up"]:
            borrowed.update({name: experts[name] for name in _EXPERTS})

    def __getstate__(self) -> dict[str, Any]:
        # A copy made in a block routes as the block does; a trace records its own model alone.
        return {**vars(self.in_force), "held": {}, "entered": None, "recorders": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "entered": Local(tuple)})  # type: ignore[no-untyped-call]


def _plus(output: Tensor, delta: Tensor) -> Tensor:
    return output + delta.view(output.shape).to(output.dtype)
