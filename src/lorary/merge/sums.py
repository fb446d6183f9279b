"""Weighted sums of adapters: of their updates, exactly, or of their factors; and the mean of either, at a rank.

Updates, `Σ w_e ΔW_e`, are summed by concatenating ranks: the size is the sum of the ranks. That does what mixing the
experts' outputs by fixed weights does, and does not depend on how an update is split into factors. LoRA Soups
(2410.13025) calls it CAT; PEFT's `add_weighted_adapter` calls it cat.

Factors, `(Σ w_e B_e)(Σ w_e A_e)`: of the rank of one adapter, with cross terms. What the paper calls µ for equal
weights (2405.11157), what Poly mixes, and what LoraHub merges (2307.13269). It depends on how each update is split into
factors, so that it makes sense for adapters with a common history: initial lora_a shared, or skills of one model. A
weight of -1 for all adapters gives what 1 gives: it cannot take an update away.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.adapter import LoraFactors
from lorary.errors import AdapterError
from lorary.merge.layers import MixedLayer, Modules, mixed_layers
from lorary.merge.truncate import Truncated, truncate


def sum_updates(adapters: Sequence[Modules], weights: Mapping[str, Tensor]) -> dict[str, LoraFactors]:
    """Sum updates by weights of each layer.

    Args:
        adapters: factors by path, of each; layers, ranks and scalings may differ.
        weights: by path, a weight for each adapter that has the layer, in order: (experts,).

    Returns:
        Factors by path, with weights in lora_b and in biases beside it. The rank of a layer is the sum of those of the
        adapters that have it.

    Raises:
        AdapterError: if a layer has different shapes in two adapters.
    """
    summed = {}
    for path, layer in mixed_layers(adapters).items():
        lora_a, lora_b = layer.concatenated()
        coefficients = weights[path].to(lora_b)
        summed[path] = LoraFactors(
            lora_a, lora_b * layer.by_rank(coefficients), layer.scaling, layer.bias(coefficients)
        )
    return summed


def weighted_sum(adapters: Sequence[Modules], weights: Float[Tensor, " experts"]) -> dict[str, LoraFactors]:
    """`sum_updates` by one weight for each adapter; a layer that an adapter lacks is an update of zero.

    Task arithmetic (2212.04089): a negative weight takes an update away.
    """
    return sum_updates(adapters, _by_layer(adapters, weights))


def mean_factors(adapters: Sequence[Modules], weights: Float[Tensor, " experts"]) -> dict[str, LoraFactors]:
    """`sum_factors` by one weight for each adapter, all of one sign: their mean by the weights, times their sum.

    The product of two sums is of the second degree in the weights: their sum is taken out, and put in once.
    """
    total = float(weights.sum()) or 1.0
    summed = sum_factors(adapters, _by_layer(adapters, weights / total))
    return {path: LoraFactors(each.lora_a, each.lora_b * total, each.scaling) for path, each in summed.items()}


def _by_layer(adapters: Sequence[Modules], weights: Tensor) -> dict[str, Tensor]:
    return {path: weights[list(layer.members)] for path, layer in mixed_layers(adapters).items()}


def sum_factors(adapters: Sequence[Modules], weights: Mapping[str, Tensor]) -> dict[str, LoraFactors]:
    """Sum factors of one rank per layer; arguments are those of `sum_updates`.

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
        coefficients = weights[path].to(lora_a)
        mixed_a, mixed_b = torch.tensordot(coefficients, lora_a, dims=1), torch.tensordot(coefficients, lora_b, dims=1)
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


def mean_of(adapters: Sequence[Modules], mix: str | None, rank: int | None) -> Truncated:
    """The mean of adapters: of their factors, as the paper's µ, or of their updates, brought to a rank.

    Args:
        adapters: factors by path, of each.
        mix: `factors` or `outputs`; None sums factors where ranks agree, and updates where they do not.
        rank: the largest to keep; where None, that of the largest of the adapters.

    Returns:
        Factors by path, and what truncation left out.
    """
    largest = max(factors.rank for modules in adapters for factors in modules.values())
    if len(adapters) == 1:
        modules = dict(adapters[0])
    else:
        equal = torch.full((len(adapters),), 1.0 / len(adapters), dtype=torch.float64)
        are_factors = mix == "factors" or (mix is None and have_one_rank(adapters))
        modules = (mean_factors if are_factors else weighted_sum)(adapters, equal)
    scaling = next(iter(adapters[0].values())).scaling
    return truncate(modules, largest if rank is None else rank, scaling)
