"""TIES: small entries are dropped, signs are settled by majority, and those that agree are averaged (2306.01708)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.adapter import LoraFactors
from lorary.errors import AdapterError
from lorary.merge.layers import Modules, mixed_layers
from lorary.merge.sums import check_one_rank

# The share of entries that the paper of this library keeps of each adapter (2405.11157, its code).
DENSITY = 0.2


def ties(adapters: Sequence[Modules]) -> dict[str, LoraFactors]:
    """Merge adapters entry by entry of their factors, lora_a and lora_b each by itself, as the paper's code does.

    Args:
        adapters: factors by path, of each; of the same layers and ranks.

    Returns:
        Factors by path, of the rank of one adapter.

    Raises:
        AdapterError: if layers, shapes or ranks differ.
    """
    layers = mixed_layers(adapters)
    check_one_rank(layers)
    if lacking := [path for path, layer in layers.items() if len(layer.members) < len(adapters)]:
        raise AdapterError("TIES needs adapters of the same layers", found=f"'{lacking[0]}' is not in all of them")
    stacks = [part for layer in layers.values() for part in layer.stacked()]
    merged = merge_entries(torch.cat([stack.flatten(1) for stack in stacks], dim=1), DENSITY)
    parts = merged.split([stack[0].numel() for stack in stacks])
    shaped = [part.view(stack.shape[1:]) for part, stack in zip(parts, stacks, strict=True)]
    pairs = zip(layers.items(), shaped[::2], shaped[1::2], strict=True)
    return {path: LoraFactors(lora_a, lora_b, layer.scaling) for (path, layer), lora_a, lora_b in pairs}


def merge_entries(entries: Float[Tensor, "experts parameters"], density: float) -> Float[Tensor, " parameters"]:
    """Trim, elect a sign, and average what agrees with it; 0 where nothing is left.

    Args:
        entries: one row per adapter.
        density: share of each row to keep, the largest magnitudes; at least one entry is kept.
    """
    num_kept = max(1, round(density * entries.shape[1]))
    largest = entries.abs().topk(num_kept, dim=1).indices
    trimmed = torch.zeros_like(entries).scatter_(1, largest, entries.gather(1, largest))
    agrees = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    return (trimmed * agrees).sum(0) / agrees.sum(0).clamp_min(1)
