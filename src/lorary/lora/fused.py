"""The fused plan: two Triton kernels in the place of PyTorch's operators, for Arrow over whole layers.

It was never measured on a device, so it is off unless LORARY_FUSED=1. PyTorch's plans are the reference.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from lorary.errors import UsageError
from lorary.lora.gate import Gate
from lorary.ops.native import is_differentiated

VARIABLE = "LORARY_FUSED"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_fused_on() -> bool:
    """Whether the environment asks for the fused plan.

    Raises:
        UsageError: if it does and Triton is not installed, or it asks for something else.
    """
    value = os.environ.get(VARIABLE, "0")
    if value not in ("0", "1"):
        raise UsageError(f"{VARIABLE} must be 0 or 1", found=repr(value), remedy="leave it out for 0")
    if value == "1" and find_spec("triton") is None:
        raise UsageError(
            f"{VARIABLE}=1 needs the package 'triton', which is not installed",
            remedy=f"leave {VARIABLE} out, or install Triton; PyTorch for CUDA brings it",
        )
    return value == "1"


def is_fusable(gate: Gate, x: Tensor, output: Tensor, down: Tensor, up: Tensor) -> bool:
    """Whether the kernels compute what a layer is asked for: no gradients, and scores |x . prototype|, as Arrow's.

    Args:
        gate: of the layer.
        x: what the layer was given.
        output: what it computed.
        down: the experts' factors and prototypes.
        up: likewise.
    """
    if not (gate.reads_prototypes and not gate.reads_z and gate.quick is not None):
        return False
    if not (x.dtype in DTYPES and output.dtype in DTYPES and down.dtype is torch.float32):
        return False
    return not is_differentiated(x, output, down, up)
