"""The plans by which a routed layer computes its experts, one function each, named as docs/routers.md names them.

Their results agree, and nothing of size (tokens, experts, d_out) ever exists. `down` holds rank-concatenated lora_a,
which prototypes may follow; `up` rank-concatenated lora_b, transposed, scalings folded in; z is `x downᵀ`. What an
expert adds beside its factors, `beside` computes under any plan.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorary.ops.choose import Chosen, Mix
from lorary.ops.native import FEW_TOKENS, NativeRoute, native_mix


def compiled_at_once(
    route: NativeRoute, x: Float[Tensor, "tokens d_in"], output: Float[Tensor, "*batch d_out"], chosen: Chosen | None
) -> Float[Tensor, "*batch d_out"]:
    """The layer's output with the experts of each token added, which compiled code chooses and writes to `chosen`."""
    products = None if len(x) <= FEW_TOKENS else x @ route.read.mT
    return _as_output(route(x, _base(output, x.dtype), products, chosen), output)


def compiled(
    x: Float[Tensor, "tokens d_in"],
    chosen: Chosen,
    down: Float[Tensor, "_rows d_in"],
    up: Float[Tensor, "ranks d_out"],
    starts: Int[Tensor, " starts"],
    z: Float[Tensor, "tokens ranks"] | None,
    output: Float[Tensor, "*batch d_out"],
) -> Float[Tensor, "*batch d_out"]:
    """The layer's output with the chosen experts of each token added by compiled code: see `native_mix`."""
    return _as_output(native_mix(x, chosen, down, up, starts, _base(output, x.dtype), z), output)


def gathered(
    x: Float[Tensor, "tokens d_in"],
    chosen: Chosen,
    down: Float[Tensor, "_rows d_in"],
    up: Float[Tensor, "ranks d_out"],
    rank_index: Int[Tensor, "experts widest"],
) -> Float[Tensor, "tokens d_out"]:
    """`sum_e w_e B_e A_e x` over the chosen experts of each token: their factors are copied, no others are read.

    Args:
        x: tokens.
        chosen: their experts.
        down: as above.
        up: likewise.
        rank_index: the ranks of each expert, -1 behind its last where others have more.
    """
    picked = rank_index[chosen.experts]  # (tokens, k, widest)
    weights = torch.where(picked < 0, 0.0, chosen.weights[..., None]).flatten(1)
    picked = picked.clamp_min(0).flatten(1)
    z = (down[picked] @ x[..., None]).squeeze(-1) * weights  # (tokens, k * widest)
    return (z[:, None] @ up[picked]).squeeze(1)


def dense(
    z: Float[Tensor, "tokens ranks"],
    chosen: Chosen,
    up: Float[Tensor, "ranks d_out"],
    expert_of_rank: Int[Tensor, " ranks"],
    num_experts: int,
    mix: Mix,
    general: nn.Module | None,
) -> Float[Tensor, "tokens d_out"]:
    """All experts, weight zero for those that were not chosen; `general` takes general experts from them."""
    weights = chosen.dense(num_experts)  # (tokens, experts)
    if general is not None:
        weighted: Tensor = general(z, weights, mix)
        return weighted @ up
    return _weighted(z, weights[:, expert_of_rank], num_experts, mix) @ up


def fixed(
    x: Float[Tensor, "tokens d_in"],
    down: Float[Tensor, "ranks d_in"],
    up: Float[Tensor, "ranks d_out"],
    by_rank: Float[Tensor, " ranks"],
    num_experts: int,
    mix: Mix,
) -> Float[Tensor, "tokens d_out"]:
    """The experts that have a weight, the same for every token, given for each rank."""
    return _weighted(x @ down.mT, by_rank[None], num_experts, mix) @ up


def mixed_rows(chosen: Chosen, rows: Float[Tensor, "experts d_out"]) -> Float[Tensor, "tokens d_out"]:
    """`sum_e w_e row_e` over the chosen experts of each token: few rows are picked, for many there is a product."""
    if chosen.experts.numel() <= len(rows):
        return torch.einsum("tk,tkd->td", chosen.weights, rows[chosen.experts])
    return chosen.dense(len(rows)) @ rows


def beside(
    delta: Float[Tensor, "tokens d_out"],
    output: Float[Tensor, "*batch d_out"],
    offset: Float[Tensor, "_tokens d_out"] | None,
    gain: Float[Tensor, "_tokens d_out"] | None,
) -> Float[Tensor, "tokens d_out"]:
    """What the factors of a mixture compute, with what its experts add beside them: `delta + gain * output + offset`.

    Args:
        delta: of the factors.
        output: what the layer computed.
        offset: of the mixture, for each token or one for all; None where no expert has one.
        gain: likewise.
    """
    if gain is not None:
        delta = torch.addcmul(delta, gain, output.reshape(delta.shape).to(delta.dtype))
    return delta if offset is None else delta + offset


def _weighted(z: Tensor, by_rank: Tensor, num_experts: int, mix: Mix) -> Tensor:
    """What goes through `up`, given the weight of each rank's expert.

    Outputs: `sum_e w_e B_e A_e x`. Factors: `(sum_e w_e B_e) (sum_f w_f A_f) x`, for experts of one rank: the buffer
    becomes w_e times the sum of all experts' weighted z, since `sum_f w_f A_f x` is what every B_e is applied to.
    """
    weighted = z * by_rank
    if mix == "outputs":
        return weighted
    total = weighted.view(z.shape[0], num_experts, -1).sum(dim=1)  # (tokens, rank)
    return by_rank * total.repeat(1, num_experts)


def _base(output: Tensor, dtype: torch.dtype) -> Tensor:
    """(tokens, d_out), what compiled code adds to: the layer's output, or zeros where that is of another dtype."""
    base = output.reshape(-1, output.shape[-1]).contiguous()
    return base if base.dtype == dtype else torch.zeros_like(base, dtype=dtype)


def _as_output(total: Tensor, output: Tensor) -> Tensor:
    """What compiled code made of `_base`, as the layer's output."""
    total = total.view(output.shape)
    return total if total.dtype == output.dtype else output + total.to(output.dtype)
