"""A configuration for factors made here, whose ranks and scalings may differ from layer to layer."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from lorary.adapter import Adapter, LoraFactors
from lorary.formats.peft import tensors_of
from lorary.formats.peft_config import new_config


def new_adapter(
    name: str, modules: Mapping[str, LoraFactors], base_name: str | None, *, dropout: float = 0.0
) -> Adapter:
    """An adapter of given factors, with a configuration that PEFT reads.

    Args:
        name: of the adapter.
        modules: factors by path of the layer.
        base_name: what PEFT shall find as `base_model_name_or_path`.
        dropout: probability used in training, recorded only.

    Returns:
        The adapter. Its scalings are those that PEFT computes, alpha / rank, which is the last bit's business.
    """
    pairs = {path: (factors.rank, factors.scaling * factors.rank) for path, factors in modules.items()}
    # The rank and alpha of most layers are the rule, the others exceptions from it.
    rank, alpha = Counter(pairs.values()).most_common(1)[0][0]
    has_bias = any(factors.bias is not None for factors in modules.values())
    config = new_config(
        base_name,
        rank=rank,
        alpha=alpha,
        target_modules=sorted(modules),
        dropout=dropout,
        rank_pattern={path: layer_rank for path, (layer_rank, _) in sorted(pairs.items()) if layer_rank != rank},
        alpha_pattern={path: layer_alpha for path, (_, layer_alpha) in sorted(pairs.items()) if layer_alpha != alpha},
        lora_bias=has_bias,
        use_dora=all(factors.magnitude is not None for factors in modules.values()),
    )
    exact = {path: replace(factors, scaling=pairs[path][1] / factors.rank) for path, factors in modules.items()}
    if has_bias:  # to PEFT, all layers have one or none
        exact = {
            path: factors
            if factors.bias is not None
            else replace(factors, bias=factors.lora_b.new_zeros(factors.d_out))
            for path, factors in exact.items()
        }
    return Adapter(name, exact, config, tensors_of(exact))
