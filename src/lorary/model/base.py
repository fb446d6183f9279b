"""The frozen base model, ready to seat experts in: loaded from its files, quiet, on the right device."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lorary.errors import BaseModelError, UsageError
from lorary.formats.base import BaseFiles, resolve_base
from lorary.formats.pretrained import load_pretrained, not_loaded
from lorary.formats.quiet import quiet_transformers
from lorary.model.verdict import check_computes, context_of, settle
from lorary.model.vocabulary import check_embedded, embedded_tokens, guard_embedding

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# What old checkpoints keep although it is no weight: each model computes these anew.
_RECOMPUTED = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias)$|(^|\.)(attn|attention)\.bias$")


@dataclass(frozen=True)
class Base:
    """A base model in memory.

    Args:
        model: in eval mode; no parameter asks for gradients.
        tokenizer: has a padding token (its EOS where it had none) and pads on the left, as generation needs.
            Mask padding by length, never by the token's id: an answer ends with the same id.
        files: where it came from.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    files: BaseFiles

    def most_tokens(self, requested: int) -> int:
        """Tokens that a row may have: those asked for, or the base's context where that is shorter."""
        context = context_of(self.model)
        return requested if context is None else min(requested, context)


def load_base(reference: str | Path | BaseFiles = "embedded", *, dtype: str = "auto", device: str = "auto") -> Base:
    """Load a base model and its tokenizer, frozen and in eval mode.

    Attention is transformers' default: scaled dot product where the family has it.

    Args:
        reference: 'embedded', a transformers folder, a .gguf file, a Hub id, or files that were found before.
        dtype: a key of `DTYPES`, or 'auto': as stored on an accelerator, float32 on the CPU, where bfloat16 is
            several times slower.
        device: 'auto' (cuda, else mps, else cpu) or a torch device such as 'cpu' or 'cuda:1'.

    Returns:
        Model, tokenizer and files.

    Raises:
        BaseModelError: if the model cannot be found, cannot be loaded whole, or does not compute as Lorary supposes
            (docs/models.md).
        UsageError: if the dtype or the device does not exist here.
    """
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    files = reference if isinstance(reference, BaseFiles) else resolve_base(reference)
    # First the model: a tokenizer is looked for by the configuration too, and would be blamed for a bad one.
    model = load_model(files, kind, place)
    tokenizer = load_tokenizer(files)
    _settle_tokens(model, tokenizer, files)
    settle(model, check_computes(model, files.name))
    return Base(model, tokenizer, files)


def load_model(files: BaseFiles, dtype: torch.dtype | None, device: torch.device, **settings: Any) -> PreTrainedModel:
    """Load the weights of a base model alone, frozen and in eval mode.

    Args:
        files: where it lies.
        dtype: of its weights, as stored where None.
        device: where to put it.
        settings: further arguments of `from_pretrained`.

    Raises:
        BaseModelError: if it cannot be loaded whole.
    """
    model, report = load_pretrained(files.path, files.name, "auto" if dtype is None else dtype, **settings)
    _check_complete(report, files)
    model.to(device)
    model.requires_grad_(False)
    loaded: PreTrainedModel = model.eval()
    return loaded


def choose_device(device: str) -> torch.device:
    """The device that a word stands for.

    Args:
        device: 'auto' (cuda, else mps, else cpu) or a torch device.

    Raises:
        UsageError: if there is no such device here.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        # Asking for memory there is the one test that holds for every kind of device.
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            "the device must exist on this machine",
            found=f"{device} ({str(error).splitlines()[0][:120]})",
            remedy="use auto, or cpu",
        ) from error


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype | None:
    """The dtype that a word stands for on a device; None means as stored.

    Args:
        dtype: 'auto' or a key of `DTYPES`.
        device: where the model will lie.

    Raises:
        UsageError: if the word is none of these.
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else None
    if dtype not in DTYPES:
        words = ", ".join(("auto", *DTYPES))
        raise UsageError(f"the dtype must be one of {words}", found=dtype, remedy="use auto")
    return DTYPES[dtype]


def load_tokenizer(files: BaseFiles) -> Any:
    """The tokenizer of a base model as it is stored, without the settings that `load_base` gives it.

    Args:
        files: where it lies.

    Raises:
        BaseModelError: if it cannot be loaded.
    """
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(files.path, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise all kinds over a file they cannot read
        raise not_loaded("tokenizer", files.name, files.path, error) from error


def _check_complete(report: Mapping[str, Any], files: BaseFiles) -> None:
    """Refuse what transformers would only mention: it fills weights that are missing with random numbers."""
    for kind in ("missing_keys", "mismatched_keys"):
        if keys := sorted(map(str, report.get(kind) or ())):
            raise BaseModelError(
                f"the base model {files.name} must hold every weight of its architecture",
                found=f"{len(keys)} {kind.replace('_', ' ')}, the first {keys[0]}",
                remedy="use a checkpoint of a causal language model, or download it again",
            )
    keys = sorted(key for key in map(str, report.get("unexpected_keys") or ()) if not _RECOMPUTED.search(key))
    if keys:
        raise BaseModelError(
            f"the base model {files.name} must hold no weights but those of its architecture",
            found=f"{len(keys)} tensors that its configuration has no place for, the first {keys[0]}",
            remedy="check its config.json, or save it again with save_pretrained() of the model that is meant",
        )


def _settle_tokens(model: Any, tokenizer: Any, files: BaseFiles) -> None:
    """Give tokenizer and generation one padding token that the model has an embedding for."""
    if tokenizer.eos_token_id is None:
        raise BaseModelError(
            "the tokenizer of the base model must have an end-of-sequence token, which ends every answer",
            found=f"none in {tokenizer.name_or_path}",
            remedy="set eos_token in its tokenizer_config.json",
        )
    num_embeddings = embedded_tokens(model)
    check_embedded(tokenizer, num_embeddings, files.name)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= num_embeddings:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    if model.generation_config is not None:
        # Said to `generate`, which would otherwise warn, or pad with an id of its own.
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    guard_embedding(model, tokenizer, num_embeddings)
