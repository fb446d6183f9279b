"""The hash of a whole base: weights, configuration, tokenizer, chat template, and what ends an answer."""

import hashlib
from typing import Any

from transformers import AutoConfig, GenerationConfig

from lorary.data.tokenizer_content import content_of_tokenizer
from lorary.evaluate.generation import eos_ids
from lorary.formats.base import BaseFiles
from lorary.formats.quiet import quiet_transformers
from lorary.library.base_content import content_of_folder, content_of_model
from lorary.model.base import Base, load_tokenizer


def content_of_base(base: Base) -> str:
    """The hash of a base in memory, whatever is seated in it."""
    return _hash(content_of_model(base.model), base.tokenizer, base.model.generation_config)


def content_of_files(files: BaseFiles) -> str:
    """The hash of a base by its files: what `content_of_base` gives once they are loaded in float32 or wider.

    Raises:
        BaseModelError: if the tokenizer cannot be loaded.
    """
    with quiet_transformers():
        try:
            generation = GenerationConfig.from_pretrained(files.path, local_files_only=True)
        except OSError:  # there need not be one
            generation = GenerationConfig.from_model_config(AutoConfig.from_pretrained(files.path))
    return _hash(content_of_folder(files.path), load_tokenizer(files), generation)


def _hash(content: str, tokenizer: Any, generation: Any) -> str:
    parts = [content, content_of_tokenizer(tokenizer), str(eos_ids(generation))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
