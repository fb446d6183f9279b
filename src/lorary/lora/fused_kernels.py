"""The two Triton kernels of the fused plan, as operators that PyTorch can trace: the one file that imports Triton.

    shrink   x downᵀ in float32, read from x in its own dtype: down-projections and products with the prototypes at once
    expand   the chosen experts' up-projections, weighted and added to the layer's output

The choice between them is the gate's own, in PyTorch: equal scores are taken as in every other plan. Neither kernel
looks at a value on the host, and grids and blocks depend on shapes alone.
"""

from contextlib import nullcontext
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from triton.runtime import JITFunction

from lorary.errors import UsageError

# Edges of the blocks that one program holds; 16 is the least that matrix units of all devices take.
LEAST_TOKENS, MOST_TOKENS = 16, 64
IN_BLOCK, RANK_BLOCK, OUT_BLOCK = 32, 32, 64
# Down-projections of few tokens: narrow blocks, so that there are enough of them for a device.
FEW_ROWS, MANY_ROWS = 16, 64
DEVICES = ("cuda", "xpu")


# The number of tokens changes from pass to pass: a kernel for each would be compiled anew.
@triton.jit(do_not_specialize=["num_tokens"])
@no_type_check
def _shrink(
    x, down, products,
    num_tokens, num_rows, d_in,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, IN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # int64: tokens times features may be more than int32 holds.
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    rows = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
    for start in range(0, d_in, IN):
        features = start + tl.arange(0, IN)
        is_feature = features < d_in
        part = tl.load(
            x + tokens[:, None] * d_in + features[None, :],
            mask=(tokens[:, None] < num_tokens) & is_feature[None, :], other=0.0,
        )  # fmt: skip
        # Read transposed: (features, rows).
        factor = tl.load(
            down + rows[None, :] * d_in + features[:, None],
            mask=(rows[None, :] < num_rows) & is_feature[:, None], other=0.0,
        )  # fmt: skip
        total = tl.dot(part.to(tl.float32), factor, total, input_precision=PRECISION)
    tl.store(
        products + tokens[:, None] * num_rows + rows[None, :], total,
        mask=(tokens[:, None] < num_tokens) & (rows[None, :] < num_rows),
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
@no_type_check
def _expand(
    z, experts, weights, up, expert_of_rank, output, result,
    num_tokens, z_stride, top_k, num_ranks, d_out,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    features = tl.program_id(1) * OUT + tl.arange(0, OUT)
    is_token, is_feature = tokens < num_tokens, features < d_out
    total = tl.zeros((TOKENS, OUT), dtype=tl.float32)
    for start in range(0, num_ranks, RANKS):
        ranks = start + tl.arange(0, RANKS).to(tl.int64)
        is_rank = ranks < num_ranks
        owners = tl.load(expert_of_rank + ranks, mask=is_rank, other=-1)
        gate = tl.zeros((TOKENS, RANKS), dtype=tl.float32)
        for place in range(0, top_k):
            expert = tl.load(experts + tokens * top_k + place, mask=is_token, other=-2)
            weight = tl.load(weights + tokens * top_k + place, mask=is_token, other=0.0)
            gate += tl.where(expert[:, None] == owners[None, :], weight[:, None], 0.0)
        # NaN is not 0: a score that is not a number stays visible.
        is_gated = gate != 0.0
        is_read = tl.max(is_gated.to(tl.int32), axis=0) > 0
        # Decoding chooses few of many experts: factors that no token of the block has chosen are not read.
        if tl.max(is_read.to(tl.int32), axis=0) > 0:
            own = tl.load(z + tokens[:, None] * z_stride + ranks[None, :], mask=is_gated, other=0.0)
            factor = tl.load(
                up + ranks[:, None] * d_out + features[None, :], mask=is_read[:, None] & is_feature[None, :], other=0.0
            )
            total = tl.dot(own * gate, factor, total, input_precision=PRECISION)
    place_of = tokens[:, None] * d_out + features[None, :]
    is_place = is_token[:, None] & is_feature[None, :]
    base = tl.load(output + place_of, mask=is_place, other=0.0)
    # Rounded before it is added, and the sum once more, as the other plans do.
    delta = total.to(base.dtype).to(tl.float32)
    tl.store(result + place_of, (base.to(tl.float32) + delta).to(base.dtype), mask=is_place)


@torch.library.custom_op("lorary::fused_shrink", mutates_args=(), schema="(Tensor x, Tensor down) -> Tensor")
def shrink(x: Float[Tensor, "tokens d_in"], down: Float[Tensor, "rows d_in"]) -> Float[Tensor, "tokens rows"]:
    """`x downᵀ`, summed in float32 without a copy of x in float32.

    Args:
        x: tokens, float32, bfloat16 or float16.
        down: rank-concatenated lora_a, then one prototype per expert; float32.

    Returns:
        The products, float32.

    Raises:
        UsageError: if Triton cannot run where the tensors lie.
    """
    _check_place(x)
    x, down = x.contiguous(), down.contiguous()
    products = _room_for_products(x, down)
    num_tokens, num_rows = products.shape
    block = _token_block(num_tokens)
    rows = FEW_ROWS if num_tokens <= LEAST_TOKENS else MANY_ROWS
    if products.numel():
        with _on_device_of(x):
            _shrink[triton.cdiv(num_tokens, block), triton.cdiv(num_rows, rows)](
                x, down, products, num_tokens, num_rows, x.shape[1],
                TOKENS=block, ROWS=rows, IN=IN_BLOCK, PRECISION=_precision(),
            )  # fmt: skip
    return products


@shrink.register_fake
def _room_for_products(x: Tensor, down: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], down.shape[0], dtype=torch.float32)


@torch.library.custom_op(
    "lorary::fused_expand",
    mutates_args=(),
    schema="(Tensor z, Tensor experts, Tensor weights, Tensor up, Tensor expert_of_rank, Tensor output) -> Tensor",
)
def expand(
    z: Float[Tensor, "tokens ranks"],
    experts: Int[Tensor, "tokens k"],
    weights: Float[Tensor, "tokens k"],
    up: Float[Tensor, "ranks d_out"],
    expert_of_rank: Int[Tensor, " ranks"],
    output: Float[Tensor, "tokens d_out"],
) -> Float[Tensor, "tokens d_out"]:
    """`output + sum_e w_e B_e z_e` over the chosen experts of each token.

    Args:
        z: the experts' down-projections, float32; its rows are contiguous.
        experts: the chosen ones of each token, int64.
        weights: their routing weights, float32; 0 for a place that no expert took.
        up: rank-concatenated lora_b, transposed, scalings folded in; float32.
        expert_of_rank: the expert that each rank belongs to, int64.
        output: what the layer computed, float32, bfloat16 or float16; it stays as it is.

    Returns:
        The sum, in the dtype of `output`.

    Raises:
        UsageError: if Triton cannot run where the tensors lie.
    """
    _check_place(z)
    assert z.stride(1) == 1 or z.shape[1] <= 1
    experts, weights, up, output = experts.contiguous(), weights.contiguous(), up.contiguous(), output.contiguous()
    result = torch.empty_like(output)
    (num_tokens, d_out), block = output.shape, _token_block(len(output))
    if result.numel():
        with _on_device_of(z):
            _expand[triton.cdiv(num_tokens, block), triton.cdiv(d_out, OUT_BLOCK)](
                z, experts, weights, up, expert_of_rank, output, result,
                num_tokens, z.stride(0), experts.shape[1], z.shape[1], d_out,
                TOKENS=block, RANKS=RANK_BLOCK, OUT=OUT_BLOCK, PRECISION=_precision(),
            )  # fmt: skip
    return result


@expand.register_fake
def _room_for_result(
    z: Tensor, experts: Tensor, weights: Tensor, up: Tensor, expert_of_rank: Tensor, output: Tensor
) -> Tensor:
    return torch.empty_like(output, memory_format=torch.contiguous_format)


def _check_place(tensor: Tensor) -> None:
    if isinstance(_shrink, JITFunction) and tensor.device.type not in DEVICES:
        raise UsageError(
            "LORARY_FUSED=1 needs a device that Triton compiles for",
            found=f"tensors on {tensor.device.type}",
            remedy="leave LORARY_FUSED out, or set TRITON_INTERPRET=1 to run the kernels slowly, for tests",
        )


def _on_device_of(tensor: Tensor) -> Any:
    """Triton starts a kernel on the current device, which need not be that of a layer."""
    return nullcontext() if tensor.is_cpu else torch.get_device_module(tensor.device).device(tensor.device)


def _token_block(num_tokens: int) -> int:
    return min(max(triton.next_power_of_2(num_tokens), LEAST_TOKENS), MOST_TOKENS)


def _precision() -> str:
    """How float32 is multiplied: as the other plans' products are, by PyTorch's own setting."""
    is_exact = torch.get_float32_matmul_precision() == "highest" or torch.version.hip is not None
    return "ieee" if is_exact else "tf32"
