"""How many threads are worth having: as many as there are cores that nothing else uses now."""

import os
import time
from collections.abc import Collection
from pathlib import Path

STAT = Path("/proc/stat")
# Long enough to see what runs all the time, short enough to wait for.
LOOK_S = 0.4


def usable_cores() -> set[int]:
    """Numbers of the cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def free_threads() -> tuple[int, int]:
    """Threads that would have a core of their own, at least one, and the cores that this process may use.

    On Linux the cores are watched for a moment. Elsewhere the mean load of the last minute is taken off.
    """
    cores = usable_cores()
    try:
        before = STAT.read_text()
        time.sleep(LOOK_S)
        busy = busy_cores(before, STAT.read_text(), cores)
    except OSError:
        busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return max(1, len(cores) - round(busy)), len(cores)


def busy_cores(before: str, after: str, cores: Collection[int]) -> float:
    """How many cores were busy between two readings, as a number with parts of a core.

    Args:
        before: text of `/proc/stat`.
        after: its text later.
        cores: the numbers of those that count.
    """
    first, second = _ticks(before), _ticks(after)
    busy = 0.0
    for core in cores:
        if core in first and core in second:
            total, idle = (second[core][i] - first[core][i] for i in (0, 1))
            busy += 1 - idle / total if total else 0.0
    return busy


def _ticks(text: str) -> dict[int, tuple[int, int]]:
    """By core, ticks of the clock since the start: all, and those without work."""
    ticks = {}
    for line in text.splitlines():
        name, *counts = line.split() or [""]
        if name.startswith("cpu") and name[3:].isdecimal():
            # Idle, and waiting for a disk. The time of guests is counted in that of users already.
            ticks[int(name[3:])] = (sum(map(int, counts[:8])), sum(map(int, counts[3:5])))
    return ticks
