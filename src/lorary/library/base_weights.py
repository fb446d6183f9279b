"""Single weights of the base model of a library, read from its folder where there is one."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lorary.errors import BaseModelError
from lorary.formats.base import EMBEDDED, resolve_base
from lorary.formats.checkpoint import weight_files
from lorary.formats.pretrained import empty_model
from lorary.library.fingerprint_folder import loaded_model, stored_name


def base_folder(name: str, revision: str | None) -> Path | None:
    """The folder of a base model by its recorded name, None where it is not on this machine; nothing is downloaded.

    Args:
        name: 'embedded', a path, a Hub id, or a name that somebody gave a live model.
        revision: the commit of a Hub id.
    """
    from huggingface_hub import snapshot_download  # takes a moment, and few adapters bring weights of the base

    try:
        if name == EMBEDDED or Path(os.path.expanduser(name)).exists():
            return resolve_base(name).path
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (BaseModelError, OSError, ValueError):
        return None


def base_weights(folder: Path, names: Collection[str]) -> dict[str, Tensor]:
    """Weights by the names that the live model gives them; names that it lacks are left out.

    Args:
        folder: a transformers folder.
        names: of parameters.

    Raises:
        BaseModelError: if the folder is no base model.
    """
    try:
        model = empty_model(folder)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        present = [name for name in names if name in parameters]
        weights = _stored(folder, present, parameters, str(getattr(model, "base_model_prefix", "")))
        if weights is None:
            return _of(loaded_model(folder), present)
    except BaseModelError:
        raise
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
        raise BaseModelError(
            f"base model {folder} must be readable: an adapter brings copies of its weights, which are compared",
            found=f"{type(error).__name__}: {str(error)[:300]}",
            remedy="repair the base model's folder, or save the adapter with save_embedding_layers=False",
        ) from error
    return weights


def weights_of_model(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """Weights of a live model by name; names that it lacks are left out."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: parameters[name].detach() for name in names if name in parameters}


def is_plain(weight: Tensor) -> bool:
    """Whether the numbers of a live weight are those of the file: it is not quantised, nor offloaded."""
    return weight.is_floating_point() and not weight.is_meta and type(weight).dequantize is Tensor.dequantize


def _of(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    return {name: weight.cpu() for name, weight in weights_of_model(model, names).items()}


def _stored(
    folder: Path, names: Collection[str], parameters: Mapping[str, Tensor], prefix: str
) -> dict[str, Tensor] | None:
    """The weights as the checkpoint has them; None where it names or shapes one of them otherwise."""
    files = weight_files(folder, str(folder))
    weights = {}
    for name in names:
        # A head that is tied to the embedding is stored under the embedding's name.
        tied = [alias for alias, weight in parameters.items() if weight is parameters[name]]
        stored = next(
            (key for candidate in (name, *tied) if (key := stored_name(candidate, prefix, files)) is not None), None
        )
        if stored is None:
            return None
        with safe_open(files[stored], framework="pt") as file:
            tensors: Any = file
            weights[name] = tensors.get_tensor(stored)
        if weights[name].shape != parameters[name].shape:
            return None
    return weights
