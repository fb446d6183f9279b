"""The fields of a base model's configuration that change what it computes, and by which of them two models differ.

A list of fields that do not matter, not of those that do: a family may bring fields that nobody here knows.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

# How a model is stored, run, trained, labelled or told to stop, and no part of what it computes from a text.
_NO_MATTER = frozenset(
    {
        "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward", "cls_token_id",
        "decoder_start_token_id", "dtype", "eos_token_id", "gradient_checkpointing", "id2label", "label2id",
        "name_or_path", "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id",
        "prefix", "pretraining_tp", "problem_type", "quantization_config",
        "return_dict", "sep_token_id", "task_specific_params", "tokenizer_class", "torch_dtype",
        "transformers_version", "unk_token_id", "use_cache", "vocab_size",
    }
)  # fmt: skip
_NO_MATTER_PARTS = ("dropout", "pdrop", "initializer_", "_loss_coef", "summary_")


def configuration_of(model: Any) -> dict[str, Any] | None:
    """The fields that change what a model computes, as a document of JSON; None for a model without configuration.

    Args:
        model: a transformers model.
    """
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    if to_dict is None:
        return None
    document: dict[str, Any] = json.loads(json.dumps(_plain(to_dict())))
    return document


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in sorted(value.items(), key=str) if _matters(str(key))}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no word for it
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _matters(field: str) -> bool:
    is_inert = field in _NO_MATTER or field.startswith("_") or any(part in field for part in _NO_MATTER_PARTS)
    return not is_inert


def differing_fields(
    recorded: Mapping[str, Any] | None, current: Mapping[str, Any] | None
) -> dict[str, tuple[Any, Any]]:
    """By name, the fields in which two configurations differ, with both values.

    A field that one side lacks was brought or dropped by another version of transformers, and stands at its default.

    Args:
        recorded: as `configuration_of` gives it, or None where an older Lorary recorded none.
        current: likewise.
    """
    return {} if recorded is None or current is None else dict(_differing(recorded, current, ""))


def _differing(
    recorded: Mapping[str, Any], current: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    # Only the fields of a configuration have defaults; an entry that the parameters of RoPE lack is a difference.
    has_defaults = not prefix or "model_type" in recorded
    names = recorded.keys() & current.keys() if has_defaults else recorded.keys() | current.keys()
    for name in sorted(names):
        old, new = recorded.get(name), current.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differing(old, new, f"{prefix}{name}.")
        elif not _equal(old, new):
            yield f"{prefix}{name}", (old, new)


def _equal(first: Any, second: Any) -> bool:
    """Whether two values are one, for a model that may keep its numbers in single precision, as GGUF files do."""
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=1e-6)
    return bool(first == second)


def in_words(differing: Mapping[str, tuple[Any, Any]]) -> str:
    """The first few differing fields, recorded value first.

    >>> in_words({"rms_norm_eps": (1e-06, 0.1)})
    'rms_norm_eps from 1e-06 to 0.1'
    """
    words = [f"{name} from {str(old)[:60]} to {str(new)[:60]}" for name, (old, new) in differing.items()]
    more = f" and {len(words) - 4} more" if len(words) > 4 else ""
    return ", ".join(words[:4]) + more
