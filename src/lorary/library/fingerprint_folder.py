"""The fingerprint of a model on disk: shapes from its configuration, sampled values read lazily from safetensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open
from torch import nn

from lorary.errors import BaseModelError, UsageError
from lorary.formats.checkpoint import weight_files
from lorary.formats.pretrained import empty_model, load_pretrained
from lorary.library.fingerprint import Fingerprint, fingerprint_of_model, sampled_positions, skeleton_of


def fingerprint_of_folder(path: str | Path) -> Fingerprint:
    """The fingerprint of a transformers directory: what `fingerprint_of_model` gives once it is loaded.

    Nothing but a few pages of the weights is read, so a 7B model takes no longer than a small one. Where the
    checkpoint names its tensors otherwise than the model does, the model is loaded instead.

    Args:
        path: a folder with config.json and safetensors.

    Raises:
        BaseModelError: if the folder holds no causal language model that transformers can build.
    """
    folder = Path(path)
    try:
        model = empty_model(folder)
        files = weight_files(folder, str(folder))
        skeleton = skeleton_of(model)
        samples: dict[str, tuple[float, ...]] = {}
        dtype = "unknown"
        for name, weight in skeleton.matrices.items():
            stored = stored_name(name, str(getattr(model, "base_model_prefix", "")), files)
            if stored is None or (sample := _sample(files[stored], stored, tuple(weight.shape))) is None:
                return fingerprint_of_model(loaded_model(folder))
            dtype = dtype if samples else sample[0]
            samples[name] = sample[1]
    except UsageError:  # no room for a temporary folder: nothing is said of the base
        raise
    except Exception as error:  # transformers raises all kinds over a folder that it cannot read
        raise BaseModelError(
            f"base model {folder} must be a transformers directory of a causal language model, with safetensors",
            found=_in_words(error),
            remedy="give a folder with config.json and model.safetensors of an architecture that transformers knows",
        ) from error
    return skeleton.with_samples(dtype, samples)


def loaded_model(folder: Path) -> nn.Module:
    """The model of a folder.

    Raises:
        ValueError: if the checkpoint lacks weights.
    """
    model, outcome = load_pretrained(folder, str(folder))
    if missing := sorted(outcome["missing_keys"]):
        raise ValueError(f"the checkpoint lacks {len(missing)} weights of the model, {missing[0]} among them")
    return cast(nn.Module, model)


def stored_name(name: str, prefix: str, files: Mapping[str, Path]) -> str | None:
    """The name of a weight in the checkpoint; checkpoints of a headless model lack the model's own prefix."""
    return next((stored for stored in (name, name.removeprefix(f"{prefix}.")) if stored in files), None)


def _sample(file: Path, name: str, shape: tuple[int, ...]) -> tuple[str, tuple[float, ...]] | None:
    """The dtype and the sampled entries of one stored matrix; None if it is not stored as the model has it."""
    with safe_open(file, framework="pt") as tensors:
        matrix: Any = tensors.get_slice(name)
        if tuple(matrix.get_shape()) != shape:
            return None
        rows, columns = sampled_positions(*shape)
        entries = [
            matrix[row : row + 1, column : column + 1]
            for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
        ]
    if not entries[0].is_floating_point():
        return None
    dtype = str(entries[0].dtype).removeprefix("torch.")
    return dtype, tuple(float(entry.float().item()) for entry in entries)


def _in_words(error: Exception) -> str:
    if isinstance(error, BaseModelError):
        return f"{error.rule} ({error.found})"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
