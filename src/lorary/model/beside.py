"""What an expert adds to a layer beside its factors: a bias, and the magnitudes of DoRA.

DoRA (2402.09353) multiplies each row of `W + delta` by `g = magnitude / norm of that row`, which is a constant of the
layer. So the expert adds `(g - 1) * (W x)` and `g * (delta x)`: the first is a gain of what the layer computed, without
the layer's own bias, and the second is lora_b with g in it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorary.adapter import LoraFactors
from lorary.errors import AdapterError
from lorary.formats.peft_files import FLOAT_DTYPES
from lorary.library.fingerprint import plain_tensor
from lorary.lora.seat import linear_shape

# Numbers of a weight that are in float64 at once.
_MOST_NUMBERS = 2**22
# Of the largest output: what half precision and quantised activations leave between a layer and its weight.
_MOST_DIFFERENCE = 0.05


class Beside(NamedTuple):
    """What one expert adds beside its factors, (d_out,) in float64 on the CPU; None for what it does not have.

    Args:
        offset: the same for every token.
        gain: times what the layer itself computed, its bias included.
    """

    offset: Tensor | None
    gain: Tensor | None


def beside_of(layer: nn.Module, path: str, name: str, factors: LoraFactors) -> Beside:
    """What one expert adds beside its factors.

    Args:
        layer: that it fits, with the base's weight.
        path: of the layer, for errors.
        name: of the adapter, for errors.
        factors: of the expert.

    Raises:
        AdapterError: for a DoRA whose layer's weight cannot be read as a matrix of floats, or has a row of zeros.
    """
    offset = None if factors.bias is None else factors.scaling * factors.bias.cpu().double()
    if factors.magnitude is None:
        return Beside(offset, None)
    norms = _row_norms(base_weight(layer, path, name), factors)
    if not bool(norms.all()):
        row = int((norms == 0).nonzero()[0])
        raise AdapterError(
            f"adapter '{name}' must have at {path} no row of W + scaling * lora_b @ lora_a that is zero",
            found=f"row {row}, to which PEFT gives outputs that are not finite",
            remedy="leave the layer out of its targets: DoRA cannot scale what has no length",
        )
    gain = factors.magnitude.cpu().double() / norms - 1
    bias: Any = getattr(layer, "bias", None)
    if bias is not None:
        offset = -gain * bias.detach().cpu().double() + (0.0 if offset is None else offset)
    return Beside(offset, gain)


def scaled_up(factors: LoraFactors, gain: Tensor | None, like: Tensor) -> Tensor:
    """lora_b as it stands in a stack: transposed, scaling and the gain of DoRA in it, (rank, d_out).

    Args:
        factors: of one expert.
        gain: as it stands in the stack; None where no expert of the layer has one.
        like: of the stack's dtype and device.
    """
    up = factors.lora_b.mT.to(like) * factors.scaling
    return up if gain is None else up * (1 + gain)


def base_weight(layer: nn.Module, path: str, name: str) -> Tensor:
    """The matrix (d_out, d_in) that a layer multiplies with.

    Args:
        layer: a linear layer.
        path: of the layer, for errors.
        name: of the adapter that needs it, for errors.

    Raises:
        AdapterError: if it cannot be read: it is quantised or lies elsewhere, or the layer computes in another way.
    """
    shape, stored = linear_shape(layer), getattr(layer, "weight", None)
    found = f"a {type(layer).__name__} without one"
    if isinstance(stored, Tensor) and stored.is_meta:
        found = "it is offloaded"
    elif isinstance(stored, Tensor):
        weight = plain_tensor(stored)
        is_conv1d, is_packed = hasattr(layer, "nx"), type(stored).dequantize is not Tensor.dequantize
        matrix = weight.mT if is_conv1d else weight
        found = f"a {type(weight).__name__} {weight.dtype} {tuple(weight.shape)} of a {type(layer).__name__}"
        is_read = type(weight) is Tensor and weight.dtype in FLOAT_DTYPES
        if is_read and shape is not None and matrix.shape == shape[::-1]:
            if not is_packed and (type(layer) is nn.Linear or is_conv1d):
                return matrix
            if _multiplies_by(layer, matrix):
                return matrix
            found = f"a {type(layer).__name__}, which computes something else than weight @ x + bias"
    raise AdapterError(
        f"adapter '{name}' is a DoRA and must find the base's weight at {path} as a matrix of floats",
        found=found,
        remedy="load the base without quantisation and offloading, or merge the adapter into the base with PEFT",
    )


@torch.no_grad()
def _multiplies_by(layer: nn.Module, matrix: Tensor) -> bool:
    """Whether a layer of an unknown kind computes what its weight says, on two vectors."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, matrix.shape[1], generator=generator).to(matrix)
    bias: Any = getattr(layer, "bias", None)
    expected = torch.nn.functional.linear(x, matrix, bias).double()
    output = layer.forward(x)
    if not isinstance(output, Tensor) or output.shape != expected.shape:
        return False
    return bool((output.double() - expected).abs().max() <= _MOST_DIFFERENCE * expected.abs().max())


@torch.no_grad()
def _row_norms(weight: Tensor, factors: LoraFactors) -> Tensor:
    """The norm of each row of W + delta, (d_out,) in float64 on the CPU; no matrix in float64 is ever whole."""
    device = torch.device("cpu") if weight.device.type == "mps" else weight.device  # there is no float64 on it
    lora_a, lora_b = factors.lora_a.to(device).double(), factors.lora_b.to(device).double() * factors.scaling
    step = max(1, _MOST_NUMBERS // weight.shape[1])
    parts = zip(weight.split(step), lora_b.split(step), strict=True)
    norms = [torch.linalg.vector_norm(torch.addmm(part.to(device).double(), up, lora_a), dim=1) for part, up in parts]
    return torch.cat(norms).cpu()
