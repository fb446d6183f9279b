"""A hash of what a tokenizer does: which ids a text becomes, which text ids become, and what it puts around them."""

import hashlib
import json
from typing import Any

from lorary.data.chat import chat_frame

# Where a tokenizer comes from, and padding, which Lorary sets itself and masks: no part of what it does.
NOT_CONTENT = frozenset({
    "name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file", "tokenizer_object",
    "added_tokens_decoder", "pad_token", "pad_token_id", "padding_side", "padding", "pad_to_multiple_of",
    "pad_token_type_id", "backend", "files_loaded", "local_files_only", "is_local", "tokenizer_class",
    "processor_class", "_commit_hash", "auto_map", "fix_mistral_regex",
})  # fmt: skip
# Tokenizers that run code of their own are known by what they make of this.
PROBE = "Ünïcode, 12 345 tabs\tand  spaces .\nLine's end !  <s> </s>"


def content_of_tokenizer(tokenizer: Any) -> str:
    """The hash: vocabulary, merges, normaliser, added and special tokens, chat template, sides and options.

    Args:
        tokenizer: a transformers tokenizer.

    Returns:
        64 hexadecimal digits.
    """
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if key not in NOT_CONTENT}
    options = {key: value for key, value in tokenizer.init_kwargs.items() if key not in NOT_CONTENT}
    ids = list(tokenizer(PROBE, verbose=False)["input_ids"])
    document = [
        _pieces(tokenizer), special, options, getattr(tokenizer, "chat_template", None), tokenizer.eos_token_id,
        tokenizer.truncation_side, ids, tokenizer.decode(ids, clean_up_tokenization_spaces=False),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(document, sort_keys=True, default=str).encode()).hexdigest()


def _pieces(tokenizer: Any) -> Any:
    """What a tokenizer of the library `tokenizers` is, whole; the vocabulary of another."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return sorted(tokenizer.get_vocab().items())
    described = json.loads(backend.to_str())
    # Both are left by the last call; padding also enters the list of added tokens, where it decides nothing.
    return {key: value for key, value in described.items() if key not in ("padding", "truncation")}


def text_of(tokenizer: Any, template: str) -> dict[str, str]:
    """What is recorded of how text became tokens: the tokenizer's hash, and what a chat template wrote before prompts.

    Args:
        tokenizer: that of the base model.
        template: `plain` or `chat`.
    """
    prefix = {"prompt_prefix": chat_frame(tokenizer).prefix} if template == "chat" else {}
    return {"tokenizer": content_of_tokenizer(tokenizer), **prefix}
