"""The fingerprint of a model on disk: shapes from its configuration, sampled values read lazily from safetensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lorary.errors import BaseModelError
from lorary.formats.quiet import quiet_transformers
from lorary.library.fingerprint import Fingerprint, fingerprint_of_model, sampled_positions, skeleton_of

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


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
        files = files_of_tensors(folder)
        skeleton = skeleton_of(model)
        samples: dict[str, tuple[float, ...]] = {}
        dtype = "unknown"
        for name, weight in skeleton.matrices.items():
            stored = stored_name(name, str(getattr(model, "base_model_prefix", "")), files)
            if stored is None or (found := _sample(files[stored], stored, tuple(weight.shape))) is None:
                return fingerprint_of_model(loaded_model(folder))
            dtype = dtype if samples else found[0]
            samples[name] = found[1]
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
        raise BaseModelError(
            f"base model {folder} must be a transformers directory of a causal language model, with safetensors",
            found=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
            remedy="give a folder with config.json and model.safetensors of an architecture that transformers knows",
        ) from error
    return Fingerprint(skeleton.architecture, skeleton.shapes, skeleton.layers, dtype, samples, skeleton.language)


def empty_model(folder: Path) -> nn.Module:
    """The model that a folder describes, on the meta device."""
    # transformers takes seconds to import, and opening or listing a library never comes here.
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet_transformers(), torch.device("meta"):
        # Code that comes with a model is never run.
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


def loaded_model(folder: Path) -> nn.Module:
    """The model of a folder.

    Raises:
        ValueError: if the checkpoint lacks weights.
    """
    from transformers import AutoModelForCausalLM  # as above

    with quiet_transformers():
        model, outcome = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    if missing := sorted(outcome["missing_keys"]):
        raise ValueError(f"the checkpoint lacks {len(missing)} weights of the model, {missing[0]} among them")
    return cast(nn.Module, model)


def files_of_tensors(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor of the checkpoint."""
    if (folder / SINGLE_FILE).exists():
        with safe_open(folder / SINGLE_FILE, framework="pt") as file:
            return dict.fromkeys(file.keys(), folder / SINGLE_FILE)
    index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    return {name: folder / file for name, file in index["weight_map"].items()}


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
