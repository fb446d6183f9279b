"""Adding a low-rank update to a linear layer's output, in training."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def add_low_rank(
    output: Float[Tensor, "*batch d_out"],
    x: Float[Tensor, "*batch d_in"],
    down: Float[Tensor, "spans rank d_in"],
    up: Float[Tensor, "spans rank d_out"],
    lengths: Sequence[int],
) -> Float[Tensor, "*batch d_out"]:
    """`output + x downᵀ up`, each span of tokens with factors of its own.

    Plain autograd multiplies by the thin factors in orders that cost matrix libraries up to six times as much. Here
    both factors lie with the rank axis first, forward and backward, and only z = x downᵀ is kept beside x.

    Args:
        output: what is added to, of any float dtype.
        x: of the dtype of the factors, or of that of `output`.
        down: lora_a of each span.
        up: lora_b of each span, transposed and scaled, of the dtype of `down`.
        lengths: tokens of each span, in the order of the flattened batch, which they cover.

    Returns:
        The sum in the dtype of `output`; where that is narrower, only the finished update is rounded to it.
    """
    result: Tensor = _AddLowRank.apply(output, x, down, up, tuple(lengths))  # type: ignore[no-untyped-call]
    return result


class _AddLowRank(torch.autograd.Function):
    """The sum and its gradients; see `add_low_rank`."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, down: Tensor, up: Tensor, lengths: tuple[int, ...]) -> Tensor:
        down, up = down.contiguous(), up.contiguous()
        tokens = x.reshape(-1, x.shape[-1])
        z = tokens.new_empty(len(tokens), down.shape[1], dtype=down.dtype)
        result = torch.empty_like(output, memory_format=torch.contiguous_format)
        spans = zip(
            *(t.view(-1, t.shape[-1]).split(lengths) for t in (output.contiguous(), tokens, z, result)),
            down,
            up,
            strict=True,
        )
        for slot_output, slot_x, slot_z, slot_result, slot_down, slot_up in spans:
            torch.mm(slot_x.to(down.dtype), slot_down.mT, out=slot_z)
            if output.dtype == up.dtype:
                torch.addmm(slot_output, slot_z, slot_up, out=slot_result)
            else:
                torch.add(slot_output, (slot_z @ slot_up).to(output.dtype), out=slot_result)
        ctx.lengths = lengths
        ctx.save_for_backward(x, z, down, up)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z, down, up = ctx.saved_tensors
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if ctx.needs_input_grad[1] else None
        grad_down, grad_up = torch.empty_like(down), torch.empty_like(up)
        slot_grads, slot_xs, slot_zs = (t.reshape(-1, t.shape[-1]).split(ctx.lengths) for t in (grad, x, z))
        into = None if grad_x is None else grad_x.view(-1, x.shape[-1]).split(ctx.lengths)
        for i, (slot_grad, slot_x, slot_z) in enumerate(zip(slot_grads, slot_xs, slot_zs, strict=True)):
            wide = slot_grad.to(up.dtype)
            grad_z = wide @ up[i].mT
            torch.mm(grad_z.mT, slot_x.to(down.dtype), out=grad_down[i])
            torch.mm(slot_z.mT, wide, out=grad_up[i])
            if into is not None and x.dtype == down.dtype:
                torch.mm(grad_z, down[i], out=into[i])
            elif into is not None:
                into[i].copy_(grad_z @ down[i])
        return grad, grad_x, grad_down, grad_up, None
