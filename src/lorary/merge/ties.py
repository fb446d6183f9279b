"""TIES: small entries are dropped, signs are settled by majority, and those that agree are averaged (2306.01708)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.adapter import LoraFactors
from lorary.errors import AdapterError
from lorary.merge.layers import Modules, mixed_layers
from lorary.merge.prune import keep_largest
from lorary.merge.sums import check_one_rank


def ties(
    updates: Float[Tensor, "experts d_out d_in"], weights: Float[Tensor, " experts"], *, density: float
) -> Float[Tensor, "d_out d_in"]:
    """Merge the updates of one layer: trim each, elect a sign for each entry, average what agrees with it.

    The weights scale the updates before signs are elected, so that a negative one votes against its update. With equal
    weights this is what PEFT's function `ties` computes, except for an entry whose sum is exactly 0: it becomes 0.

    Args:
        updates: of the experts, or their cores in a common space, float32 or float64.
        weights: of the experts.
        density: share of each update to keep, the largest magnitudes.
    """
    return elect_and_average(keep_largest(updates, density) * weights[:, None, None])


def elect_and_average(entries: Float[Tensor, "experts *entries"]) -> Float[Tensor, "*entries"]:
    """The mean of the entries whose sign is that of the sum over experts; zeros have no vote, and 0 is left of none."""
    agrees = (entries.sign() == entries.sum(0).sign()) & (entries != 0)
    return (entries * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def ties_factors(adapters: Sequence[Modules], *, density: float) -> dict[str, LoraFactors]:
    """Merge adapters entry by entry of their factors, lora_a and lora_b each by itself, as the code of 2405.11157 does.

    Entries are trimmed over the whole adapter, not layer by layer.

    Args:
        adapters: factors by path, of each; of the same layers and ranks.
        density: share of the entries of each adapter to keep.

    Returns:
        Factors by path, of the rank of one adapter.

    Raises:
        AdapterError: if layers, shapes or ranks differ.
    """
    layers = mixed_layers(adapters)
    check_one_rank(layers)
    if lacking := [path for path, layer in layers.items() if len(layer.members) < len(adapters)]:
        raise AdapterError(
            "TIES on factors needs adapters of the same layers",
            found=f"'{lacking[0]}' is not in all of them",
            remedy="use --method ties, which merges updates",
        )
    stacks = [part for layer in layers.values() for part in layer.stacked()]
    merged = elect_and_average(keep_largest(torch.cat([stack.flatten(1) for stack in stacks], dim=1), density))
    parts = merged.split([stack[0].numel() for stack in stacks])
    shaped = [part.view(stack.shape[1:]) for part, stack in zip(parts, stacks, strict=True)]
    pairs = zip(layers.items(), shaped[::2], shaped[1::2], strict=True)
    return {path: LoraFactors(lora_a, lora_b, layer.scaling) for (path, layer), lora_a, lora_b in pairs}
