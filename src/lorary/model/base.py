"""The frozen base model, ready to seat experts in: loaded from its files, quiet, on the right device."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lorary.errors import BaseModelError, UsageError
from lorary.formats.base import BaseFiles, resolve_base
from lorary.formats.quiet import quiet_transformers
from lorary.model.verdict import check_computes, context_of, settle_positions

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


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

    def most_tokens(self, asked: int) -> int:
        """Tokens that a row may have: those asked for, or the base's context where that is shorter."""
        context = context_of(self.model)
        return asked if context is None else min(asked, context)


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
    tokenizer = load_tokenizer(files)
    model = load_model(files, kind, place)
    _settle_padding(model, tokenizer)
    check_computes(model, files.name)
    settle_positions(model)
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
    with quiet_transformers():
        model, report = _load_model(files, dtype, **settings)
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
        raise _not_loaded("tokenizer", files, error) from error


def _load_model(files: BaseFiles, dtype: torch.dtype | None, **settings: Any) -> tuple[Any, Mapping[str, Any]]:
    """The model and transformers' account of which weights it missed or left over."""
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            files.path,
            dtype="auto" if dtype is None else dtype,
            # Without this transformers would fall back to a pickled file.
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **settings,
        )
    except Exception as error:  # as above
        raise _not_loaded("weights", files, error) from error
    return model, report


def _not_loaded(part: str, files: BaseFiles, error: Exception) -> BaseModelError:
    lines = str(error).strip().splitlines()
    return BaseModelError(
        f"the {part} of the base model {files.name} must load from {files.path}",
        found=f"{type(error).__name__}: {lines[0][:300] if lines else ''}",
        remedy="copy or download the model again; a family newer than the installed transformers needs a newer one",
    )


def _check_complete(report: Mapping[str, Any], files: BaseFiles) -> None:
    """Refuse what transformers would only mention: it fills weights that are missing with random numbers."""
    for kind in ("missing_keys", "mismatched_keys"):
        if keys := sorted(map(str, report.get(kind) or ())):
            raise BaseModelError(
                f"the base model {files.name} must hold every weight of its architecture",
                found=f"{len(keys)} {kind.replace('_', ' ')}, the first {keys[0]}",
                remedy="use a checkpoint of a causal language model, or download it again",
            )
    if keys := sorted(map(str, report.get("unexpected_keys") or ())):
        warnings.warn(
            f"the base model {files.name} holds {len(keys)} tensors that its architecture does not use, "
            f"the first {keys[0]}: they are left out",
            stacklevel=3,
        )


def _settle_padding(model: Any, tokenizer: Any) -> None:
    """Give tokenizer and generation one padding token, and say so to `generate`, which would otherwise warn."""
    if tokenizer.eos_token_id is None:
        raise BaseModelError(
            "the tokenizer of the base model must have an end-of-sequence token, which ends every answer",
            found=f"none in {tokenizer.name_or_path}",
            remedy="set eos_token in its tokenizer_config.json",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    if model.generation_config is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
