"""Adding a low-rank update to a linear layer's output, in training."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def add_low_rank(
    output: Float[Tensor, "sequences seq d_out"],
    x: Float[Tensor, "sequences seq d_in"],
    down: Float[Tensor, "sequences rank d_in"],
    up: Float[Tensor, "sequences rank d_out"],
) -> Float[Tensor, "sequences seq d_out"]:
    """`output + x downᵀ up`, each sequence with factors of its own.

    Plain autograd multiplies by the thin factors in orders that cost matrix libraries up to six times as much. Here
    both factors lie with the rank axis in the middle, forward and backward, and only z = x downᵀ is kept beside x.

    Args:
        output: what is added to, of any float dtype.
        x: of the dtype of the factors, or of that of `output`.
        down: lora_a of each sequence.
        up: lora_b of each sequence, transposed and scaled, of the dtype of `down`.

    Returns:
        The sum in the dtype of `output`; where that is narrower, only the finished update is rounded to it.
    """
    result: Tensor = _AddLowRank.apply(output, x, down, up)  # type: ignore[no-untyped-call]
    return result


class _AddLowRank(torch.autograd.Function):
    """The sum and its gradients; see `add_low_rank`."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        down, up = down.contiguous(), up.contiguous()
        z = torch.bmm(x.to(down.dtype), down.mT)  # (sequences, seq, rank)
        ctx.save_for_backward(x, z, down, up)
        if output.dtype == up.dtype:
            return torch.baddbmm(output, z, up)
        return output + torch.bmm(z, up).to(output.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z, down, up = ctx.saved_tensors
        wide = grad.to(up.dtype)
        grad_z = torch.bmm(wide, up.mT)
        grad_x = torch.bmm(grad_z, down).to(x.dtype) if ctx.needs_input_grad[1] else None
        return grad, grad_x, torch.bmm(grad_z.mT, x.to(down.dtype)), torch.bmm(z.mT, wide)
