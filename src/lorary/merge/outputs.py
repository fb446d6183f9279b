"""The weighted sum of updates, exactly: `Σ w_e ΔW_e` by concatenating ranks. Its size is the sum of the ranks.

It does what mixing the experts' outputs by fixed weights does, and does not depend on how an update is split into
factors. LoRA Soups (2410.13025) calls it CAT; PEFT's `add_weighted_adapter` calls it cat.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from lorary.adapter import LoraFactors
from lorary.merge.layers import Modules, mixed_layers


def sum_updates(adapters: Sequence[Modules], weights: Mapping[str, Tensor]) -> dict[str, LoraFactors]:
    """Put adapters together by weights of each layer.

    Args:
        adapters: factors by path, of each; layers, ranks and scalings may differ.
        weights: by path, a weight for each adapter that has the layer, in order: (experts,).

    Returns:
        Factors by path, with weights in lora_b. The rank of a layer is the sum of those of the adapters that have it.

    Raises:
        AdapterError: if a layer has different shapes in two adapters.
    """
    summed = {}
    for path, layer in mixed_layers(adapters).items():
        lora_a, lora_b = layer.concatenated()
        summed[path] = LoraFactors(lora_a, lora_b * layer.by_rank(weights[path].to(lora_b)), layer.scaling)
    return summed
