"""PEFT's `linear`: factors summed by square roots of the weights, for adapters that another tool merged so."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.adapter import LoraFactors
from lorary.merge.layers import Modules, mixed_layers
from lorary.merge.sums import check_one_rank


def linear(adapters: Sequence[Modules], weights: Float[Tensor, " experts"]) -> dict[str, LoraFactors]:
    """`(Σ √|w s| B)(Σ ±√|w s| A)` of each layer, as `add_weighted_adapter(combination_type="linear")` computes it.

    The product has cross terms between adapters: n equal adapters of weight 1/n give n times one of them. `mu` is the
    mean of factors without that.

    Args:
        adapters: factors by path, of each; of one rank in each layer.
        weights: of the adapters; a negative one changes the sign of its lora_a.

    Returns:
        Factors by path, of scaling 1.

    Raises:
        AdapterError: if a layer has different shapes or ranks in two adapters.
    """
    layers = mixed_layers(adapters)
    check_one_rank(layers)
    merged = {}
    for path, layer in layers.items():
        scalings = torch.tensor([factors.scaling for factors in layer.factors], dtype=torch.float64)
        signed = weights.double()[list(layer.members)] * scalings
        roots = signed.abs().sqrt()
        dtype = layer.factors[0].lora_a.dtype
        lora_a = torch.stack([factors.lora_a for factors in layer.factors]).double()
        lora_b = torch.stack([factors.lora_b for factors in layer.factors]).double()
        signs = torch.where(signed < 0, -1.0, 1.0)
        down, up = torch.tensordot(roots * signs, lora_a, dims=1), torch.tensordot(roots, lora_b, dims=1)
        merged[path] = LoraFactors(down.to(dtype), up.to(dtype), 1.0)
    return merged
