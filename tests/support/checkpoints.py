"""Checkpoints of small models, as they are and with names of their own."""

from pathlib import Path
from typing import Any

import safetensors.torch

from lorary.formats.quiet import quiet_transformers


def save(model: Any, folder: Path, **settings: Any) -> Path:
    """Save a model as transformers does."""
    with quiet_transformers():
        model.save_pretrained(folder, **settings)
    return folder


def save_renamed(model: Any, folder: Path) -> None:
    """Save a model whose checkpoint names its tensors otherwise than the model does."""
    file = save(model, folder) / "model.safetensors"
    renamed = {
        name.replace("model.", "elsewhere."): tensor for name, tensor in safetensors.torch.load_file(file).items()
    }
    safetensors.torch.save_file(renamed, file, metadata={"format": "pt"})
