"""Time and memory of a stretch of work."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Cost:
    """What a stretch of work took; filled when it ends.

    Args of the filled record:
        seconds: on the wall.
        peak_bytes: see `lorary.evaluate.cells.Cell`.
    """

    seconds: float = 0.0
    peak_bytes: int | None = None


@contextmanager
def measured(device: torch.device) -> Iterator[Cost]:
    """Measure a stretch of work.

    On CUDA the peak is what torch had allocated there. Elsewhere it is the resident set of the whole process, whose
    high-water mark Linux lets a process set back; other systems do not, and the peak stays None.

    Args:
        device: where the work happens.

    Yields:
        The record.
    """
    cost = Cost()
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    can_measure = is_cuda or _set_back()
    started = time.perf_counter()
    try:
        yield cost
    finally:
        cost.seconds = time.perf_counter() - started
        if can_measure:
            cost.peak_bytes = torch.cuda.max_memory_allocated(device) if is_cuda else _high_water()


def _set_back() -> bool:
    """Set the high-water mark back to what is resident now; False where that cannot be done."""
    with suppress(OSError):
        _CLEAR.write_text("5")
        return True
    return False


def _high_water() -> int | None:
    with suppress(OSError, ValueError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return None
