"""A hash of what a base model computes with: finer than the fingerprint, for results that are kept.

The fingerprint that a library records tells relatives from strangers by eight matrices. A score hangs on every weight,
and on what the configuration says beside them (the base of rotary positions, an epsilon), so that here all of these
count: weights by evenly spaced entries of each, so that it stays a matter of a second on a model of any size.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lorary.formats.checkpoint import weight_files
from lorary.formats.pretrained import empty_model
from lorary.library.fingerprint import bare_modules, plain_tensor, sampled_positions
from lorary.library.fingerprint_folder import loaded_model, stored_name

# Where a model comes from and how it is run, and no part of what it computes.
NOT_CONTENT = frozenset({"transformers_version", "dtype", "torch_dtype", "use_cache", "name_or_path", "architectures"})


def content_of_model(model: nn.Module) -> str:
    """The hash of a live model, whatever Lorary or PEFT have seated in it.

    Args:
        model: a transformers model, or a PeftModel around one.

    Returns:
        64 hexadecimal digits.
    """
    # What is offloaded to the disk has no values here.
    tensors = ((name, tensor) for name, tensor in _tensors(model) if not tensor.is_meta)
    return _hash(model, {name: _sample(plain_tensor(tensor)) for name, tensor in tensors})


def content_of_folder(path: str | Path) -> str:
    """The hash of a transformers directory: what `content_of_model` gives once it is loaded in its own dtype or wider.

    Args:
        path: a folder with config.json and safetensors, which `fingerprint_of_folder` has taken.
    """
    folder = Path(path)
    model = empty_model(folder)
    files, samples = weight_files(folder, str(folder)), dict[str, list[float]]()
    prefix = str(getattr(model, "base_model_prefix", ""))
    entries: dict[Path, list[tuple[str, str, tuple[int, ...]]]] = {}
    for name, tensor in _tensors(model):
        stored = stored_name(name, prefix, files)
        if stored is None:
            return content_of_model(loaded_model(folder))
        entries.setdefault(files[stored], []).append((name, stored, tuple(tensor.shape)))
    for file, names in entries.items():
        with safe_open(file, framework="pt") as tensors:
            for name, stored, shape in names:
                sample = _sample_stored(tensors, stored, shape)
                if sample is None:
                    return content_of_model(loaded_model(folder))
                samples[name] = sample
    return _hash(model, samples)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters of the bare base by name; of tied ones the first."""
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    visited: set[int] = set()
    for path, module in bare_modules(base):
        for name, parameter in module.named_parameters(path, recurse=False, remove_duplicate=False):
            if id(parameter) not in visited and parameter.numel():
                visited.add(id(parameter))
                yield name, parameter


def _sample(tensor: Tensor) -> list[float]:
    rows, columns = _positions(tuple(tensor.shape))
    flat = tensor.detach().reshape(max(1, tensor.shape[0] if tensor.ndim > 1 else 1), -1)
    return [float(value) for value in flat[rows.to(flat.device), columns.to(flat.device)].float().cpu()]


def _sample_stored(tensors: Any, name: str, shape: tuple[int, ...]) -> list[float] | None:
    """The same of a stored tensor; None if it is not stored as the model has it, or is no float."""
    stored = tensors.get_slice(name)
    if tuple(stored.get_shape()) != shape or not str(stored.get_dtype()).startswith(("F", "BF")):
        return None
    # The file is mapped into memory: no more of a tensor is read than the pages that its entries lie on.
    return _sample(tensors.get_tensor(name))


def _positions(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    rows = shape[0] if len(shape) > 1 else 1
    return sampled_positions(rows, max(1, torch.Size(shape).numel() // max(1, rows)))


def _hash(model: nn.Module, samples: dict[str, list[float]]) -> str:
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    fields = base.config.to_dict() if hasattr(base, "config") else {}
    config = {key: value for key, value in fields.items() if key not in NOT_CONTENT and not key.startswith("_")}
    document = json.dumps([type(base).__name__, config, samples], sort_keys=True, default=str)
    return hashlib.sha256(document.encode()).hexdigest()
