"""Memory that ran out: whether an error says so, and how what is left unused goes back to the device."""

import gc

import torch

from lorary.errors import LoraryError

# What torch says where it has no class of errors for it: on the CPU, on Apple's devices, in CUDA's libraries.
_WORDS = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # An error of Lorary's own may tell of such a one, and has said all there is to say.
    is_torch = isinstance(error, RuntimeError) and not isinstance(error, LoraryError)
    return is_torch and any(word in str(error) for word in _WORDS)


def release_memory(device: torch.device) -> None:
    """Give back to a device what torch keeps of it although nothing needs it any more.

    Args:
        device: where memory ran out. On the CPU only Python's own garbage is collected.
    """
    gc.collect()  # frames that an exception has left may hold activations
    empty_cache = getattr(getattr(torch, device.type, None), "empty_cache", None)
    if empty_cache is not None:
        empty_cache()
