"""Rotary positions of a GGUF file: their base, their width, and how they are scaled, as transformers says it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

FREQUENCIES = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = frozenset({FREQUENCIES, LONG, SHORT})
# What llama.cpp takes where a file gives no base.
DEFAULT_BASE = 10000.0
# What Llama 3.1 and its kin scale their positions with; a file keeps no more of it than the factors that result.
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_CONTEXT = 1.0, 4.0, 8192
# Families of which not each entry of a head need be rotated.
_PARTLY = frozenset({"phi3", "stablelm", "nemotron", "minimax_m2"})
_SCALING = "rope.scaling."
# Values at which these change nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "alpha": (0,),
    "attn_factor": (1,),
    "yarn_attn_factor": (1,),
    "yarn_ext_factor": (-1, 1),
    "yarn_log_multiplier": (0,),
}
_INERT = frozenset({"finetuned"})
_YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}


class Lost(ValueError):
    """A key or tensor whose meaning the converted model would not have."""


def head_dim(config: Any) -> int:
    """The size of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_of(config: Any) -> dict[str, Any]:
    """The rotary parameters that a file's keys are about: of layers that see everything, where there are others."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return rope.get("full_attention", rope)


def apply_rope(architecture: str, keys: Mapping[str, Any], tensors: Mapping[str, Sequence[float]], config: Any) -> None:
    """Give a configuration the rotary positions of a file.

    Args:
        architecture: as the file names it.
        keys: values under the architecture's name, by what follows it.
        tensors: the entries of `ROPE_TENSORS` that the file has.
        config: changed in place.

    Raises:
        Lost: naming the key or the tensor that has no counterpart.
    """
    rope = rope_of(config)
    scaling = {name.removeprefix(_SCALING): value for name, value in keys.items() if name.startswith(_SCALING)}
    if not rope:
        if names := [*tensors, *(f"{architecture}.{_SCALING}{name}" for name in scaling)]:
            raise Lost(f"{names[0]}, and the converted model has no rotary positions")
        return
    nested = rope is not config.rope_parameters
    if "rope.freq_base" in keys or not nested:
        rope["rope_theta"] = float(keys.get("rope.freq_base", DEFAULT_BASE))
    if "rope.freq_base_swa" in keys:
        config.rope_parameters["sliding_attention"]["rope_theta"] = float(keys["rope.freq_base_swa"])
    _set_width(architecture, keys, config, rope)
    scale = _scaling_of(architecture, keys, scaling)
    if scaling.get("type") == "longrope" and LONG not in tensors:
        raise Lost(f"{architecture}.{_SCALING}type = longrope, and the file has no {LONG}")
    if tensors:
        if scale:
            raise Lost(f"both {', '.join(sorted(tensors))} and {architecture}.{_SCALING}type = {scale['rope_type']}")
        scale = _scaling_by_tensors(keys, scaling, tensors, config, rope)
    if scale:
        if "original_max_position_embeddings" in scale and hasattr(config, "original_max_position_embeddings"):
            config.original_max_position_embeddings = scale["original_max_position_embeddings"]
        base_fields = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        rope.clear()
        rope.update(base_fields | scale)


def _set_width(architecture: str, keys: Mapping[str, Any], config: Any, rope: dict[str, Any]) -> None:
    size = head_dim(config)
    for name in ("rope.dimension_count", "rope.dimension_count_swa"):
        width = keys.get(name)
        if width is None or architecture == "gemma4":
            continue
        if config.model_type in _PARTLY:
            rope["partial_rotary_factor"] = width / size
            if "partial_rotary_factor" in config.to_dict():
                config.partial_rotary_factor = width / size
        if int(size * rope.get("partial_rotary_factor", 1.0)) != width:
            raise Lost(f"{architecture}.{name} = {width}, and the converted model rotates all {size} entries of a head")


def _scaling_of(architecture: str, keys: Mapping[str, Any], scaling: Mapping[str, Any]) -> dict[str, Any]:
    """The scaling that the keys ask for; empty for none."""
    kind = scaling.get("type", "linear" if "rope.scale_linear" in keys else "none")
    factor = float(scaling.get("factor", keys.get("rope.scale_linear", 1.0)) or 1.0)
    used = {"type", "factor", "original_context_length", *_INERT, *(_YARN if kind == "yarn" else ())}
    for name, value in scaling.items():
        is_used = name in used or (kind == "longrope" and name == "attn_factor")
        if not is_used and value not in _NEUTRAL.get(name, ()) and not (kind == "none" and name == "attn_factor"):
            raise Lost(f"{architecture}.{_SCALING}{name} = {value}, and nothing of the converted model stands for it")
    if kind in ("none", "longrope") or (kind == "linear" and factor == 1.0):
        if kind == "none" and factor != 1.0 and "type" not in scaling:
            kind = "linear"  # llama.cpp scales linearly where a factor is given alone
        else:
            return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn" or "original_context_length" not in scaling:
        raise Lost(f"{architecture}.{_SCALING}type = {kind}, and nothing of the converted model stands for it")
    betas = {field: float(scaling[name]) for name, field in _YARN.items() if name in scaling}
    context = int(scaling["original_context_length"])
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": context, **betas}


def _scaling_by_tensors(
    keys: Mapping[str, Any], scaling: Mapping[str, Any], tensors: Mapping[str, Sequence[float]],
    config: Any, rope: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The scaling that a file's factors for each frequency ask for; empty for none."""
    num = int(head_dim(config) * rope.get("partial_rotary_factor", 1.0)) // 2
    for name, values in tensors.items():
        if len(values) != num or not all(math.isfinite(value) and value > 0 for value in values):
            raise Lost(f"the tensor {name} of {len(values)} entries, for {num} frequencies of the converted model")
    if FREQUENCIES in tensors and len(tensors) > 1:
        raise Lost(f"the tensors {', '.join(sorted(tensors))} together")
    context = int(keys.get("context_length", config.max_position_embeddings))
    if FREQUENCIES in tensors:
        factors = list(tensors[FREQUENCIES])
        if all(value == 1.0 for value in factors):
            return {}
        original = int(scaling.get("original_context_length", LLAMA3_CONTEXT))
        for guess in (original, LLAMA3_CONTEXT, context):
            if _is_llama3(factors, rope["rope_theta"], guess):
                return {
                    "rope_type": "llama3", "factor": max(factors), "low_freq_factor": LLAMA3_LOW,
                    "high_freq_factor": LLAMA3_HIGH, "original_max_position_embeddings": guess,
                }  # fmt: skip
        # Factors of any origin, the same at every length.
        return _long(factors, factors, original, 1.0)
    if LONG not in tensors or SHORT not in tensors or "original_context_length" not in scaling:
        raise Lost(f"the tensor {next(iter(tensors))} without the other, or without the context that they divide")
    original = int(scaling["original_context_length"])
    ratio = context / original
    by_ratio = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    return _long(list(tensors[LONG]), list(tensors[SHORT]), original, float(scaling.get("attn_factor", by_ratio)))


def _long(long: list[float], short: list[float], original: int, attention: float) -> dict[str, Any]:
    return {
        "rope_type": "longrope", "long_factor": long, "short_factor": short, "attention_factor": attention,
        "original_max_position_embeddings": original,
    }  # fmt: skip


def _is_llama3(factors: Sequence[float], base: float, context: int) -> bool:
    """Whether Llama 3's formula gives these factors, for frequencies of an original context of so many positions."""
    largest = max(factors)
    for index, factor in enumerate(factors):
        turns = context / (2 * math.pi * base ** (index / len(factors)))
        smooth = min(max((turns - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW), 0.0), 1.0)
        if not math.isclose(factor, 1 / ((1 - smooth) / largest + smooth), rel_tol=1e-4):
            return False
    return True
