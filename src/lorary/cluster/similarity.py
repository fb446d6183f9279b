"""Similarity of adapters: cosine between their whole updates, through rank x rank products only."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.adapter import Adapter, LoraFactors
from lorary.cluster.spill import Factors, FactorSpill, check_comparable
from lorary.ops.gram import cosine_of_gram, delta_gram

# Multiplications up to which float64 is used throughout: some ten seconds on one core.
CHEAP = 3e11
# Largest |A| |B| / |BA| for which float32 products keep the cosines' error below 1e-5 (it grows with the square; at 2,
# which four orthogonal ranks of one size have, it is below 1e-6).
WELL_SCALED = 8.0


def adapter_similarity(adapters: Iterable[Adapter]) -> Float[Tensor, "experts experts"]:
    """Cosine similarity between the updates of adapters, all layers taken together.

    It compares what the adapters compute and not their factors, so that the gauge (A -> GA, B -> BG⁻¹), the initial
    draw and unequal ranks play no part. A layer that one of two adapters lacks counts as zero for it.

    Args:
        adapters: at least one; consumed one at a time.

    Returns:
        Symmetric matrix in float64, ones on the diagonal; an adapter that computes nothing is similar to none (0).

    Raises:
        AdapterError: if a layer has different shapes in two adapters.
    """
    return cosine_of_gram(adapter_gram(adapters))


def adapter_gram(adapters: Iterable[Adapter]) -> Float[Tensor, "experts experts"]:
    """Inner products `<ΔW_i, ΔW_j>` between the updates of adapters, all layers taken together.

    Memory holds one adapter while they arrive, then one layer of all. The sums over layers are in float64. The products
    are in float64 where that is cheap or float32 would lose digits, and in float32 otherwise.

    Args:
        adapters: at least one; consumed one at a time.

    Returns:
        Symmetric matrix in float64.

    Raises:
        AdapterError: if a layer has different shapes in two adapters.
        UsageError: if the temporary folder is full.
    """
    with FactorSpill() as spill:
        multiplications = 0.0
        for adapter in adapters:
            check_comparable(adapter)
            modules = {path: _folded(factors) for path, factors in adapter}
            multiplications += sum(adapter.rank * (a.numel() + b.numel()) for a, b in modules.values())
            spill.add(adapter.name, modules)
        if multiplications * spill.num_experts > CHEAP:
            gram, factor_sizes = _summed_gram(spill, torch.float32)
            if bool((factor_sizes <= WELL_SCALED**2 * gram.diagonal()).all()):
                return gram
        return _summed_gram(spill, torch.float64)[0]


def _folded(factors: LoraFactors) -> Factors:
    """The factors in float32 at least, lora_b transposed and scaled."""
    dtype = torch.promote_types(factors.lora_a.dtype, torch.float32)
    return factors.lora_a.to(dtype), factors.lora_b.mT.to(dtype) * factors.scaling


def _summed_gram(spill: FactorSpill, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inner products summed over layers, and for each adapter the sum of `|A|² |B|²` over its layers.

    Rounding errors of the rank x rank products grow with the factors, the products only with the update: where the
    factors are much larger than their product, the float32 result has lost digits.
    """
    number = spill.num_experts
    gram = torch.zeros(number, number, dtype=torch.float64)
    factor_sizes = torch.zeros(number, dtype=torch.float64)
    for path in spill.paths:
        layer = spill.layer(path)
        at_least = torch.promote_types(layer.lora_a.dtype, dtype)
        lora_a, lora_b_t, owner = layer.lora_a.to(at_least), layer.lora_b_t.to(at_least), layer.expert_of_rank
        gram += delta_gram(lora_a, lora_b_t.mT, owner, number)
        sizes = torch.zeros(2, number, dtype=torch.float64)
        for size, factor in zip(sizes, (lora_a, lora_b_t), strict=True):
            size.index_add_(0, owner, factor.square().sum(1).double())
        factor_sizes += sizes.prod(0)
    return gram, factor_sizes
