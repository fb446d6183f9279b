"""pass@k: how likely one of k programs passes its tests."""

import re
from math import comb

# Each of the k programs of a row is generated and run: more of them would never end.
_PASS = re.compile(r"pass@([1-9][0-9]{0,3})", re.ASCII)


def parse_pass(metric: str) -> int | None:
    """The k of `pass@k`, None for any other metric.

    >>> parse_pass("pass@10"), parse_pass("pass@0"), parse_pass("em")
    (10, None, None)
    """
    found = _PASS.fullmatch(metric)
    return int(found[1]) if found else None


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Unbiased estimate that at least one of k programs passes, from n >= k programs of which c passed.

    It is 1 - C(n - c, k) / C(n, k), the share of all draws of k out of the n that hold a program that passed.
    Source: arXiv 2107.03374, equation 1.

    >>> pass_at_k(2, 1, 1), pass_at_k(2, 1, 2)
    (0.5, 1.0)
    """
    return 1.0 - comb(num_samples - num_passed, k) / comb(num_samples, k)
