"""What a GGUF file says of its model beside the weights, and whether all of it reaches the converted model.

transformers reads some of a file's keys and passes the others over, so that a model whose rotary positions are scaled
would be converted into another one. Here each key under the architecture's name is carried over, found to agree with
the converted configuration, or known to change nothing; any other is refused by name.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorary.errors import BaseModelError
from lorary.formats.gguf_rope import ROPE_TENSORS, Lost, apply_rope, head_dim, rope_of

# What a refusal of one key says where no value would do.
NOWHERE = "nothing of the converted model stands for it"


@dataclass(frozen=True)
class Metadata:
    """The head of a GGUF file.

    Args:
        architecture: as the file names it.
        keys: values under the architecture's name, by what follows it.
        tensors: number of entries of each tensor.
        rope: entries of the tensors that scale rotary positions.
    """

    architecture: str
    keys: Mapping[str, Any]
    tensors: Mapping[str, int]
    rope: Mapping[str, list[float]]


def read_metadata(gguf_file: Path) -> Metadata:
    """Read the head of a file.

    Raises:
        Lost: if the file is no model.
        Exception: of many kinds, if it is damaged.
    """
    from gguf import GGUFReader, dequantize  # imported here: only a file that is being converted needs it

    reader = GGUFReader(str(gguf_file))
    values = {name: _value(field) for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    if values.get("general.type") not in (None, "model"):
        raise Lost(f"general.type is {values['general.type']}, not model")
    architecture = str(values["general.architecture"])
    prefix = f"{architecture}."
    return Metadata(
        architecture,
        {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)},
        {str(tensor.name): int(tensor.n_elements) for tensor in reader.tensors},
        {
            str(tensor.name): dequantize(tensor.data, tensor.tensor_type).ravel().tolist()
            for tensor in reader.tensors
            if str(tensor.name) in ROPE_TENSORS
        },
    )


def _value(field: Any) -> Any:
    parts = [field.parts[index] for index in field.data]
    kinds = [kind.name for kind in field.types]
    if kinds[-1] == "STRING":
        texts = [bytes(part).decode("utf-8", "replace") for part in parts]
        return texts if kinds[0] == "ARRAY" else texts[0]
    numbers = [part[0].item() for part in parts]
    return numbers if kinds[0] == "ARRAY" else numbers[0]


def carry_over(metadata: Metadata, config: Any) -> None:
    """Give a configuration that transformers made of a file all that the file says.

    Args:
        metadata: of the file.
        config: changed in place.

    Raises:
        Lost: naming the key or the tensor that the model would lose.
    """
    if config.model_type == "mistral" and "attention.sliding_window" not in metadata.keys:
        config.sliding_window = None  # the class has a window by default
    if (config.pad_token_id or 0) >= config.vocab_size:
        config.pad_token_id = None  # of the class, for a vocabulary of its own
    if metadata.architecture == "llama" and "attention.key_length" not in metadata.keys:
        # transformers takes the rotated width of a head for all of it.
        config.head_dim = config.hidden_size // config.num_attention_heads
    if metadata.architecture in ("falcon", "bloom") and "output.weight" in metadata.tensors:
        config.tie_word_embeddings = False
    for name, value in metadata.keys.items():
        if not _is_possible(name, value):
            raise Lost(f"{metadata.architecture}.{name} = {str(value)[:80]}, which no model can have")
        if name in _INERT or name.startswith(("rope.scaling.", "rope.scale_linear")):
            continue
        check = _CHECKS.get(name)
        if check is None or not check(metadata, config, value):
            raise Lost(f"{metadata.architecture}.{name} = {str(value)[:80]}, and {NOWHERE}")
    _settle_gemma(metadata, config)
    if metadata.architecture not in _READ_WHOLE:
        apply_rope(metadata.architecture, metadata.keys, metadata.rope, config)


def _is_possible(name: str, value: Any) -> bool:
    """Whether a number is finite and, where frequencies are made of it or divided by it, not below zero."""
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if isinstance(value, int | float) and name in _POSITIVE:
        return value > 0
    return not (isinstance(value, int | float) and name in _NOT_NEGATIVE) or value >= 0


def check_consumed(metadata: Metadata, model: Any) -> None:
    """Refuse a file that has more entries than the model made of it, in which none is missing.

    Raises:
        Lost: naming tensors that the model has no place for, where they can be told.
    """
    counts = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    extra = range(model.config.num_hidden_layers, model.config.num_hidden_layers + _predicting(metadata))
    read = {
        name: count
        for name, count in metadata.tensors.items()
        if name not in ROPE_TENSORS and not name.startswith(tuple(f"blk.{layer}." for layer in extra))
    }
    if sum(read.values()) != sum(counts.values()):
        unknown = _without_place(read, model)
        raise Lost(
            f"{sum(read.values()):,} entries in its tensors, {sum(counts.values()):,} in the converted model"
            + (f"; it has no place for {', '.join(unknown[:3])}" if unknown else "")
        )


def _predicting(metadata: Metadata) -> int:
    """Layers that only guess further tokens ahead, which no model of transformers has."""
    return int(metadata.keys.get("nextn_predict_layers", 0)) if metadata.architecture in _READ_WHOLE else 0


def _without_place(read: Mapping[str, int], model: Any) -> list[str]:
    try:
        from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

        places = get_gguf_hf_weights_map(model, TensorProcessor(config={}))
    except Exception:  # a private part of transformers, which only words the error
        return []
    return sorted(name for name in read if name not in places)


def refused(gguf_file: Path, lost: Lost) -> BaseModelError:
    """What to say where a file says more than its converted model would.

    Args:
        gguf_file: the file.
        lost: what the model would lose.
    """
    return BaseModelError(
        f"all that the GGUF file {gguf_file} says of its model must reach the converted one",
        found=str(lost),
        remedy="name the model's transformers folder or Hub id in its stead",
    )


Check = Callable[[Metadata, Any, Any], bool]

# Read whole by transformers, in a file of its own that states every key it takes.
_READ_WHOLE = frozenset({"qwen35", "qwen35moe", "lfm2"})
# Sizes, which the shapes of the weights bear out, and notes on how the file was made.
_INERT = frozenset(
    {
        "block_count", "embedding_length", "expert_shared_count", "shortconv.l_cache", "ssm.conv_kernel",
        "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank", "tensor_data_layout", "vocab_size",
    }
)  # fmt: skip
_POSITIVE = frozenset({"rope.freq_base", "rope.freq_base_swa"})
_NOT_NEGATIVE = frozenset(
    {
        "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon", "attn_logit_softcapping",
        "final_logit_softcapping", "rope.scale_linear", "rope.scaling.attn_factor", "rope.scaling.factor",
        "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    }
)  # fmt: skip
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
# Families whose attention keeps to the window of its configuration.
_WINDOWED = frozenset({"mistral", "phi3", "starcoder2", "gemma2", "gemma3_text", "gpt_oss"})


def _one_number(value: Any) -> Any:
    """A number that is given once for each layer, where it is the same in all."""
    return value[0] if isinstance(value, list) and value and all(entry == value[0] for entry in value) else value


def _heads(_metadata: Metadata, config: Any, value: Any) -> bool:
    # Of a model without attention, such as Mamba, a file says that it has no heads.
    return bool(_one_number(value) == getattr(config, "num_attention_heads", 0))


def _groups(metadata: Metadata, config: Any, value: Any) -> bool:
    if metadata.architecture in _READ_WHOLE:
        return True
    if metadata.architecture == "falcon":
        return bool(value == 1 and config.multi_query and not config.new_decoder_architecture)
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return bool(_one_number(value) == groups)


def _head_size(metadata: Metadata, config: Any, value: Any) -> bool:
    if metadata.architecture == "gemma4":
        return bool(value == config.global_head_dim)
    if "head_dim" in config.to_dict():
        config.head_dim = value
    return bool(value == head_dim(config))


def _value_size(metadata: Metadata, config: Any, value: Any) -> bool:
    return bool(value == (config.global_head_dim if metadata.architecture == "gemma4" else head_dim(config)))


def _epsilon(_metadata: Metadata, config: Any, value: Any) -> bool:
    fields = [field for field in _EPSILONS if hasattr(config, field)]
    for field in fields:
        setattr(config, field, value)
    return bool(fields)


def _window(metadata: Metadata, config: Any, value: Any) -> bool:
    window = _one_number(value)
    if config.model_type in _WINDOWED:
        config.sliding_window = window or None
        return isinstance(window, int)
    return bool(not window or window >= metadata.keys.get("context_length", math.inf))


def _window_pattern(_metadata: Metadata, config: Any, value: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return False
    if isinstance(value, list):
        pattern = [bool(entry) for entry in value]
    else:
        pattern = [bool((layer + 1) % value) if value else False for layer in range(len(kinds))]
    config.layer_types = ["sliding_attention" if is_sliding else "full_attention" for is_sliding in pattern]
    return len(pattern) == len(kinds)


def _softcap(field: str) -> Check:
    def check(_metadata: Metadata, config: Any, value: Any) -> bool:
        if hasattr(config, field):
            setattr(config, field, value or None)
            return True
        return not value

    return check


def _scale(_metadata: Metadata, config: Any, value: Any) -> bool:
    if hasattr(config, "query_pre_attn_scalar") and value > 0:
        config.query_pre_attn_scalar = value**-2
        return True
    return math.isclose(value, head_dim(config) ** -0.5, rel_tol=1e-5)


def _experts(_metadata: Metadata, config: Any, value: Any) -> bool:
    return bool(value == (getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 0))


def _size(field: str) -> Check:
    """A size that transformers leaves at what the family's first model has; the shapes of the weights bear it out."""

    def check(_metadata: Metadata, config: Any, value: Any) -> bool:
        if hasattr(config, field):
            setattr(config, field, value)
        return True

    return check


def _same_as(field: str) -> Check:
    return lambda _metadata, config, value: bool(value == getattr(config, field, 0))


def _sets(field: str) -> Check:
    def check(_metadata: Metadata, config: Any, value: Any) -> bool:
        if hasattr(config, field):
            setattr(config, field, value)
            return True
        return not value

    return check


def _gating(metadata: Metadata, config: Any, value: Any) -> bool:
    if metadata.architecture == "minimax-m2":
        return bool(config.scoring_func == {1: "softmax", 2: "sigmoid"}.get(value))
    return metadata.architecture in ("qwen2moe", "qwen3moe") and value == 1


def _neutral(*values: Any) -> Check:
    return lambda _metadata, _config, value: value in values


def _only_for(*architectures: str, values: tuple[Any, ...] | None = None) -> Check:
    return lambda metadata, _config, value: (
        metadata.architecture in architectures and (values is None or value in values)
    )


def _rotary_of(field: str) -> Check:
    """Entries that `apply_rope` reads; here only whether the model has rotary positions at all."""

    def check(metadata: Metadata, config: Any, value: Any) -> bool:
        if metadata.architecture in _READ_WHOLE:
            return True
        return bool(rope_of(config)) and (field != "sliding" or "sliding_attention" in config.rope_parameters)

    return check


_CHECKS: Mapping[str, Check] = {
    "context_length": _size("n_positions"),
    "feed_forward_length": _size("n_inner"),
    "attention.head_count": _heads,
    "attention.head_count_kv": _groups,
    "attention.key_length": _head_size,
    "attention.key_length_swa": _value_size,
    "attention.value_length": _value_size,
    "attention.value_length_swa": _value_size,
    "attention.layer_norm_epsilon": _epsilon,
    "attention.layer_norm_rms_epsilon": _epsilon,
    "attention.sliding_window": _window,
    "attention.sliding_window_pattern": _window_pattern,
    "attention.scale": _scale,
    "attention.causal": _neutral(True),
    "attention.clamp_kqv": _neutral(0),
    "attention.max_alibi_bias": _only_for("bloom", values=(8.0,)),
    "attention.output_scale": _neutral(0, 1),
    "attention.temperature_length": _neutral(0),
    "attention.temperature_scale": _neutral(0),
    "attn_logit_softcapping": _softcap("attn_logit_softcapping"),
    "final_logit_softcapping": _softcap("final_logit_softcapping"),
    "router_logit_softcapping": _neutral(0),
    "logit_scale": _neutral(1),
    "residual_scale": _neutral(1),
    "embedding_scale": _neutral(1),
    "pooling_type": _neutral(0),
    "use_parallel_residual": _sets("use_parallel_residual"),
    "expert_count": _experts,
    "expert_feed_forward_length": _size("moe_intermediate_size"),
    "expert_shared_feed_forward_length": _size("shared_expert_intermediate_size"),
    "expert_used_count": _same_as("num_experts_per_tok"),
    "expert_weights_norm": _sets("norm_topk_prob"),
    "expert_weights_scale": _neutral(0, 1),
    "expert_gating_func": _gating,
    "expert_group_count": _neutral(0, 1),
    "expert_group_used_count": _neutral(0, 1),
    "full_attention_interval": _only_for("qwen35", "qwen35moe"),
    "nextn_predict_layers": _only_for("qwen35", "qwen35moe"),
    "rope.dimension_sections": _only_for("qwen35", "qwen35moe"),
    "rope.dimension_count": _rotary_of("full"),
    "rope.dimension_count_swa": _rotary_of("sliding"),
    "rope.freq_base": _rotary_of("full"),
    "rope.freq_base_swa": _rotary_of("sliding"),
    "ssm.group_count": _only_for("qwen35", "qwen35moe"),
    "ssm.dt_b_c_rms": _neutral(False),
}


def _settle_gemma(metadata: Metadata, config: Any) -> None:
    """The scale of a Gemma's attention, which its files leave to the reader: by the head, but in the 27B model."""
    largest = {"gemma2": 46, "gemma3": 62}.get(metadata.architecture)
    if largest is not None and "attention.scale" not in metadata.keys and "attention.key_length" in metadata.keys:
        by_model = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = by_model if config.num_hidden_layers == largest else head_dim(config)
