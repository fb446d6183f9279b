"""Random numbers that depend on a key and on nothing else."""

import hashlib

import torch


def keyed_generator(*key: object) -> torch.Generator:
    """A generator seeded by a key, such as (seed, expert name, step).

    Whatever is drawn from it is the same in every process and never depends on what else was drawn before, which is
    what makes training one expert among many equal to training it alone.

    Args:
        key: any values with a stable `str`; they are joined unambiguously.

    Returns:
        A fresh generator.
    """
    digest = hashlib.sha256("\x1f".join(str(part) for part in key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
