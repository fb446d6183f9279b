"""Shards for workers in processes of their own, which only write down where they were. Light, since many start."""

import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from lorary.errors import TaskError


@dataclass(frozen=True)
class Piece:
    """A shard that only writes down where it was worked on."""

    names: tuple[str, ...]
    library: str
    device: str = "nowhere"

    def on(self, device: str) -> "Piece":
        return replace(self, device=device)


def write_place(piece: Piece) -> None:
    """Write device, process and threads; fail, die or wait where the name says so, once or each time."""
    (name,), folder = piece.names, Path(piece.library)
    if name.startswith("waits"):
        try:
            _say_where(piece)
            time.sleep(60)
        except KeyboardInterrupt:
            (folder / f"{name}-kept").touch()
            raise
    _say_where(piece)
    if name.startswith("refused"):
        raise TaskError("no rows", found=name)
    first = not (tried := folder / f".{name}").exists()
    tried.touch()
    if name.startswith("dies") and (first or "always" in name):
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("breaks") and first:
        raise OSError(116, "Stale file handle")
    time.sleep(0.2)  # so that every worker gets some
    (folder / name).write_text(f"{piece.device} {os.getpid()} {os.environ['OMP_NUM_THREADS']}")


def _say_where(piece: Piece) -> None:
    print(f"at {piece.names[0]} on {piece.device}", file=sys.stderr, flush=True)


def pieces(folder: Path, *names: str) -> list[Piece]:
    return [Piece((name,), str(folder)) for name in names]
