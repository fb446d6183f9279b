"""The weighted sum of factors, `(Σ w_e B_e)(Σ w_e A_e)`: of the rank of one adapter, with cross terms.

What the paper calls µ for equal weights (2405.11157), what Poly mixes, and what LoraHub merges (2307.13269). It depends
on how each update is split into factors, so that it makes sense for adapters with a common history: initial lora_a
shared, or skills of one model. A weight of -1 for all adapters gives what 1 gives: it cannot take an update away.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorary.adapter import LoraFactors
from lorary.errors import AdapterError
from lorary.merge.layers import MixedLayer, Modules, mixed_layers


def sum_factors(adapters: Sequence[Modules], weights: Mapping[str, Tensor]) -> dict[str, LoraFactors]:
    """Put adapters together by weights of each layer.

    Args:
        adapters: factors by path, of each; of one rank per layer.
        weights: by path, a weight for each adapter that has the layer, in order: (experts,).

    Returns:
        Factors by path.

    Raises:
        AdapterError: if a layer has different shapes or ranks in two adapters.
    """
    summed = {}
    layers = mixed_layers(adapters)
    check_one_rank(layers)
    for path, layer in layers.items():
        lora_a, lora_b = layer.stacked()
        own = weights[path].to(lora_a)
        mixed_a, mixed_b = torch.tensordot(own, lora_a, dims=1), torch.tensordot(own, lora_b, dims=1)
        summed[path] = LoraFactors(mixed_a, mixed_b, layer.scaling)
    return summed


def have_one_rank(adapters: Sequence[Modules]) -> bool:
    """Whether in each layer all adapters that have it are of one rank, so that their factors can be summed."""
    return all(layer.has_one_rank for layer in mixed_layers(adapters).values())


def check_one_rank(layers: Mapping[str, MixedLayer]) -> None:
    """Check that factors can be summed.

    Raises:
        AdapterError: naming the first layer in which ranks differ.
    """
    for path, layer in layers.items():
        if not layer.has_one_rank:
            raise AdapterError(
                f"factors of layer '{path}' must be of one rank to be summed",
                found=f"ranks {sorted({factors.rank for factors in layer.factors})}",
                remedy="name adapters of one rank with --experts, or use a method that sums updates (cat, mu)",
            )
