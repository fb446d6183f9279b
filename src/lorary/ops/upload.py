"""Tensors of the host brought to a device, without making the host wait."""

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The same on a device.

    A plain copy to CUDA makes the host wait for all that was asked of the device before. One that is queued has read
    the host's memory when it returns. MPS gives no such promise. What comes back to the host is never queued: it would
    be read too soon.

    Args:
        tensor: on any device.
        device: where to.
    """
    return tensor.to(device, non_blocking=tensor.is_cpu and device.type != "mps")
