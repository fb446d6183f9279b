"""Memory of the routing benchmark's contenders, each in a process of its own.

    python benchmarks/route_memory.py BASE CONTENDER FOLDER TOKENS

prints what one contender takes over the library in FOLDER; see `memory.py`, which measures.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

from memory import in_process, memory_rows, run_contender
from route_models import MOST_PEER_EXPERTS, MOST_PEER_TOKENS, Shelf, load_model


def measure(
    shelf: Shelf, bare: dict[str, float] | None = None, *, peer: bool = True
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The rows of a shelf as full as it is now.

    Args:
        shelf: base and library.
        bare: what the bare base took, where that is known.
        peer: whether PEFT is measured, if it can run over so many.

    Returns:
        Rows, and what the bare base took.
    """
    experts = len(shelf.library)
    command = [__file__, shelf.name]

    def of(contender: str) -> dict[str, float]:
        return in_process(
            f"memory of {contender} over {experts}",
            [*command, contender, str(shelf.library.path.parent), str(MOST_PEER_TOKENS)],
        )

    found = {"base": bare or of("base"), "ours": of("ours")}
    if peer and experts <= MOST_PEER_EXPERTS:
        found["peer"] = of("peer")
    return memory_rows(f"{shelf.name} memory E={experts}", found, shelf.num_bytes()), found["base"]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    base, contender, folder, tokens = sys.argv[1:]
    print(json.dumps(run_contender(contender, load_model(base), Path(folder), int(tokens))))
