"""PEFT's adapter_config.json: which fields mean what, and which ones are not followed.

A field is *handled* (it changes the function and is followed exactly), *irrelevant* to the function at inference, or
*refused* unless it has its neutral value. A field that stands in none of the three tables may change the function in
a way nobody here knows, so it is refused too unless it is empty.
"""

from collections.abc import Collection, Mapping, Sized
from typing import Any

from lorary.errors import AdapterError
from lorary.formats.peft_reasons import reason_of_config
from lorary.formats.peft_selection import check_expressions

HANDLED = frozenset({
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_bias", "use_dora",
})  # fmt: skip

# The four *_config fields act through init_lora_weights only, the group size through use_qalora, megatron_core
# through megatron_config; PEFT corrects fan_in_fan_out by the type of the layer it finds.
IRRELEVANT = frozenset({
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "fan_in_fan_out", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "qalora_group_size", "runtime_config",
})  # fmt: skip

REFUSED = {
    "bias": "it trains biases of the base model",
    "modules_to_save": "it replaces whole layers of the base model",
    "target_parameters": "it adapts bare parameters, not linear layers",
    "trainable_token_indices": "it replaces rows of the embedding",
    "layer_replication": "it stacks the base model's layers anew",
    "alora_invocation_tokens": "the adapter acts only after certain tokens",
    "use_qalora": "it pools the input before lora_A",
    "use_bdlora": "its factors are block-diagonal",
    "kasa_config": "it truncates the base weight and adds a diagonal factor",
    "monteclora_config": "it samples the weights",
    "velora_config": "it replaces the projection of lora_A",
    "megatron_config": "it shards the layers for Megatron",
    "arrow_config": "it describes a router over other adapters",
    "ensure_weight_tying": "it shares factors between layers",
}

# Above any rank and alpha; far larger ones leave what float32 holds.
MOST = 1e9
# Above the number of layers of any model whose layers are listed one by one.
MOST_ENTRIES = 100_000

# Other kinds (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base weight, and only the changed base fits the adapter.
INITS_THAT_LEAVE_THE_BASE_ALONE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


def check_config(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a configuration whose function is not that of `LoraFactors` for every adapted layer.

    Args:
        name: label of the adapter, for errors.
        config: PEFT's adapter_config.json.

    Raises:
        AdapterError: naming the field, its value and what to do.
    """
    if config.get("peft_type") != "LORA":
        format_reason = reason_of_config(config)
        raise AdapterError(
            f"adapter '{name}' must be a LoRA: peft_type must be LORA",
            found=format_reason.found if format_reason else repr(config.get("peft_type"))[:200],
            remedy=format_reason.remedy if format_reason else "train a LoRA, or convert the adapter to one",
        )
    _check_initialisation(name, config.get("init_lora_weights", True))
    for field, value in config.items():
        is_neutral = value in (None, False, [], {}, "") or (field == "bias" and value == "none")
        if field in HANDLED or field in IRRELEVANT or is_neutral:
            continue
        reason = REFUSED.get(field, "the field is unknown and may change the function")
        raise AdapterError(
            f"adapter '{name}' must be a plain LoRA, but {field} is set: {reason}",
            found=f"{field} = {value!r:.200}",
            remedy="merge this part into the base model, or retrain without it",
        )
    _check_further(name, config)
    for field in ("r", "lora_alpha"):
        _check_number(name, field, config.get(field))
    for field in ("rank_pattern", "alpha_pattern"):
        _check_pattern(name, field, config.get(field))
    for field in ("target_modules", "exclude_modules", "layers_pattern"):
        _check_names(name, field, config.get(field))
    _check_layers(name, config.get("layers_to_transform"))
    check_expressions(name, config)


def _check_further(name: str, config: Mapping[str, Any]) -> None:
    """Refuse what PEFT does not load: both kinds at once, or a switch that is neither on nor off."""
    for field in ("lora_bias", "use_dora"):
        if not isinstance(config.get(field), bool | None):
            raise AdapterError(
                f"adapter '{name}' must give {field} as true or false",
                found=repr(config[field])[:200],
                remedy="write what it was trained with",
            )
    if config.get("lora_bias") and config.get("use_dora"):
        raise AdapterError(
            f"adapter '{name}' must have lora_bias or use_dora, not both: PEFT does not load such an adapter",
            found="lora_bias = True, use_dora = True",
            remedy="retrain it without lora_bias",
        )


def _check_layers(name: str, layers: object) -> None:
    numbers = layers if isinstance(layers, list) else [0 if layers is None else layers]
    _check_size(name, "layers_to_transform", numbers)
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        raise AdapterError(
            f"adapter '{name}' must give layers_to_transform as layer numbers",
            found=repr(layers)[:200],
            remedy="write whole numbers, or leave the field out for all layers",
        )


def _check_initialisation(name: str, kind: object) -> None:
    lowered = kind.lower() if isinstance(kind, str) else kind
    if lowered not in INITS_THAT_LEAVE_THE_BASE_ALONE:
        raise AdapterError(
            f"adapter '{name}' must leave the base weights alone, but its initialisation may have changed them",
            found=f"init_lora_weights = {kind!r:.200}",
            remedy="save it with PEFT's path_initial_model_for_weight_conversion, which turns it into a plain LoRA",
        )


def _check_number(name: str, field: str, value: object) -> None:
    # An integer of hundreds of digits is compared exactly, where math.isfinite would overflow.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MOST:
        raise AdapterError(
            f"adapter '{name}' must give {field} as a finite number in adapter_config.json, {MOST:g} at most",
            found=repr(value) if len(repr(value)) < 80 else f"{repr(value)[:80]}...",
            remedy="write the value it was trained with",
        )


def _check_pattern(name: str, field: str, pattern: object) -> None:
    if pattern is None:
        return
    if not isinstance(pattern, Mapping):
        raise AdapterError(f"adapter '{name}' must give {field} as a mapping", found=repr(pattern)[:200])
    _check_size(name, field, pattern)
    for key, value in pattern.items():
        _check_number(name, f"{field}[{key[:200]!r}]", value)


def _check_names(name: str, field: str, names: object) -> None:
    entries = [names] if isinstance(names, str) else [] if names is None else names
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise AdapterError(
            f"adapter '{name}' must give {field} as a list of names or one regular expression", found=repr(names)[:200]
        )
    _check_size(name, field, entries)


def _check_size(name: str, field: str, entries: Sized) -> None:
    if len(entries) > MOST_ENTRIES:
        raise AdapterError(
            f"adapter '{name}' must give {field} with {MOST_ENTRIES:,} entries at most",
            found=f"{len(entries):,}",
            remedy="name the layers by the ends of their paths, or by one regular expression",
        )


def new_config(
    base_name: str | None,
    *,
    rank: int,
    alpha: int | float,
    target_modules: Collection[str],
    dropout: float = 0.0,
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, int | float] | None = None,
    lora_bias: bool = False,
    use_dora: bool = False,
) -> dict[str, Any]:
    """An adapter_config.json for an adapter made here, with every field that changes the function written out.

    PEFT writes `target_modules` in the order of a set, which differs from run to run; here equal adapters have
    equal bytes.

    Args:
        base_name: what PEFT shall find as `base_model_name_or_path`.
        rank: the rank of layers that `rank_pattern` does not name, at least 1.
        alpha: the alpha of layers that `alpha_pattern` does not name.
        target_modules: names or dotted paths of the adapted layers; an entry matches the end of a path.
        dropout: probability used in training, recorded only.
        use_rslora: scale by alpha / sqrt(rank).
        rank_pattern: ranks by regular expression over paths.
        alpha_pattern: alphas by regular expression over paths.
        lora_bias: each lora_b has a bias.
        use_dora: each layer has a magnitude.

    Returns:
        A configuration that PEFT and `read_adapter` accept.
    """
    further = {name: True for name, is_on in (("lora_bias", lora_bias), ("use_dora", use_dora)) if is_on}
    return {
        "alpha_pattern": dict(alpha_pattern or {}),
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": dict(rank_pattern or {}),
        "target_modules": sorted(set(target_modules)),
        "task_type": "CAUSAL_LM",
        "use_rslora": use_rslora,
        **further,
    }
