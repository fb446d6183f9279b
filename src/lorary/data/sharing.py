"""Which rows share a sequence: tokens saved against what masked attention costs."""

from collections.abc import Sequence

# Longest packed sequence of a training step in tokens: the mask is seq x seq, and a model's sliding window must hold a
# sequence.
PACKED_LENGTH = 512
# What packing costs, measured on a CPU and a model of 576 features, where attention weighs more than in wider ones:
# the length at which masked attention costs a token as much as all else, and what the mask costs besides.
ATTENTION_LENGTH = 2000
MASK_COST = 0.04


def best_cuts(lengths: Sequence[int], shared: Sequence[int], longest: int = PACKED_LENGTH) -> list[int]:
    """Where to cut sorted rows into sequences at the least cost, by dynamic programming over the last cut.

    Args:
        lengths: tokens of each row.
        shared: tokens that each row has in common with the one before it.
        longest: most tokens of a sequence of several rows.

    Returns:
        0, the cuts, and the number of rows.
    """
    best = [0.0] + [float("inf")] * len(lengths)
    last = [0] * (len(lengths) + 1)
    for start in range(len(lengths)):
        tokens = lengths[start]
        for stop in range(start + 1, len(lengths) + 1):
            if stop > start + 1:
                tokens += lengths[stop - 1] - shared[stop - 1]
                if tokens > longest:
                    break
            cost = best[start] + _cost(tokens, packed=stop > start + 1)
            if cost < best[stop]:
                best[stop], last[stop] = cost, start
    cuts = [len(lengths)]
    while cuts[-1]:
        cuts.append(last[cuts[-1]])
    return cuts[::-1]


def _cost(tokens: int, *, packed: bool) -> float:
    """Cost of a sequence in tokens: causal attention touches half of what masked attention does."""
    attention = tokens / ATTENTION_LENGTH
    return tokens * (1 + MASK_COST + attention if packed else 1 + 0.5 * attention)
