"""PEFT's adapter_config.json: which fields mean what, and which ones no plain LoRA can honour.

A field is *handled* (it changes the function and is followed exactly), *irrelevant* to the function at inference, or
*refused* unless it has its neutral value. A field that stands in none of the three tables may change the function in
a way nobody here knows, so it is refused too unless it is empty.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lorary.errors import AdapterError

HANDLED = frozenset({
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
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
    "use_dora": "DoRA rescales the base weight by a learned magnitude",
    "lora_bias": "it adds a bias to lora_B",
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

# Other kinds (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base weight, and only the changed base fits the adapter.
INITS_THAT_LEAVE_THE_BASE_ALONE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


def check_config(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a configuration whose function is not `base + scaling * lora_b @ lora_a` for every adapted layer.

    Args:
        name: label of the adapter, for errors.
        config: PEFT's adapter_config.json.

    Raises:
        AdapterError: naming the field, its value and what to do.
    """
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"adapter '{name}' must be a LoRA: peft_type must be LORA",
            found=repr(config.get("peft_type")),
            remedy="train a LoRA, or convert the adapter to one",
        )
    _check_initialisation(name, config.get("init_lora_weights", True))
    for field, value in config.items():
        is_neutral = value in (None, False, [], {}, "") or (field == "bias" and value == "none")
        if field in HANDLED or field in IRRELEVANT or is_neutral:
            continue
        reason = REFUSED.get(field, "the field is unknown and may change the function")
        raise AdapterError(
            f"adapter '{name}' must be a plain LoRA, but {field} is set: {reason}",
            found=f"{field} = {value!r}",
            remedy="merge this part into the base model, or retrain without it",
        )
    for field in ("r", "lora_alpha"):
        _check_number(name, field, config.get(field))
    for field in ("rank_pattern", "alpha_pattern"):
        _check_pattern(name, field, config.get(field))
    for field in ("target_modules", "exclude_modules", "layers_pattern"):
        _check_names(name, field, config.get(field))
    layers = config.get("layers_to_transform")
    if not all(isinstance(layer, int) for layer in (layers if isinstance(layers, list) else [layers or 0])):
        raise AdapterError(f"adapter '{name}' must give layers_to_transform as layer numbers", found=repr(layers))


def _check_initialisation(name: str, kind: object) -> None:
    lowered = kind.lower() if isinstance(kind, str) else kind
    if lowered not in INITS_THAT_LEAVE_THE_BASE_ALONE:
        raise AdapterError(
            f"adapter '{name}' must leave the base weights alone, but its initialisation may have changed them",
            found=f"init_lora_weights = {kind!r}",
            remedy="save it with PEFT's path_initial_model_for_weight_conversion, which turns it into a plain LoRA",
        )


def _check_number(name: str, field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise AdapterError(
            f"adapter '{name}' must give {field} as a finite number in adapter_config.json",
            found=repr(value),
            remedy="write the value it was trained with",
        )


def _check_pattern(name: str, field: str, pattern: object) -> None:
    if pattern is None:
        return
    if not isinstance(pattern, Mapping):
        raise AdapterError(f"adapter '{name}' must give {field} as a mapping", found=repr(pattern))
    for key, value in pattern.items():
        _check_number(name, f"{field}[{key!r}]", value)
        _check_expression(name, field, key)


def _check_names(name: str, field: str, names: object) -> None:
    if isinstance(names, str):
        _check_expression(name, field, names)
    elif names is not None and not (isinstance(names, list) and all(isinstance(entry, str) for entry in names)):
        raise AdapterError(
            f"adapter '{name}' must give {field} as a list of names or one regular expression", found=repr(names)
        )


def _check_expression(name: str, field: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise AdapterError(
            f"adapter '{name}' must give valid regular expressions in {field}", found=f"{expression!r}: {error}"
        ) from error


def scaling_of(name: str, config: Mapping[str, Any], path: str, rank: int) -> float:
    """The factor before `lora_b @ lora_a` for one layer, by PEFT's rule.

    Args:
        name: label of the adapter, for errors.
        config: a configuration that `check_config` let pass.
        path: dotted path of the layer in the base model.
        rank: the rank its factors have.

    Returns:
        alpha / rank, or alpha / sqrt(rank) where use_rslora is set; alpha may differ by layer (alpha_pattern).

    Raises:
        AdapterError: if the rank is not the one that the configuration states for the layer.
    """
    stated = _by_pattern(config.get("rank_pattern"), path, config["r"])
    if stated != rank:
        raise AdapterError(
            f"adapter '{name}' must have at {path} the rank its adapter_config.json states ({stated})",
            found=f"rank {rank}",
            remedy="correct r or rank_pattern in adapter_config.json",
        )
    alpha = _by_pattern(config.get("alpha_pattern"), path, config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _by_pattern(pattern: Mapping[str, int | float] | None, path: str, default: int | float) -> int | float:
    """PEFT's rule: the first key, in order, that matches the whole path or the end of it after a dot."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def is_targeted(config: Mapping[str, Any], path: str) -> bool:
    """Whether PEFT, given this configuration, puts a LoRA at a layer: weights for any other layer it would ignore.

    Args:
        config: PEFT's adapter_config.json.
        path: dotted path of a linear layer in the base model.
    """
    excluded, targets = config.get("exclude_modules"), config.get("target_modules")
    if excluded and _is_named(excluded, path):
        return False
    if targets is None or targets == "all-linear":
        return True  # PEFT chooses the layers by the architecture, which a configuration does not know
    if isinstance(targets, str) or path in targets:
        return _is_named(targets, path)
    return _is_named(targets, path) and _is_in_layers(config, path)


def _is_named(names: str | Sequence[str], path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return path in names or any(path.endswith(f".{name}") for name in names)


def _is_in_layers(config: Mapping[str, Any], path: str) -> bool:
    wanted, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or r"[^.]*"
    if wanted is None or wanted == []:
        return True
    # The first numbered segment is the layer; a later one may be an expert of a mixture.
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        prefix = r".*?\." if pattern == r"[^.]*" else r"(?:^|.*?\.)"
        if match := re.match(rf"{prefix}{pattern}\.(\d+)\.", path):
            return int(match.group(1)) in ([wanted] if isinstance(wanted, int) else wanted)
    return False


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

    Returns:
        A configuration that PEFT and `read_adapter` accept.
    """
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
    }
