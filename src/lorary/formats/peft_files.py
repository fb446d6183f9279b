"""PEFT's two files as bytes: read from a folder, and taken apart into a configuration and tensors."""

import json
import os
import warnings
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from lorary.errors import AdapterError
from lorary.formats.peft_reasons import (
    CONFIG_FILE,
    PICKLE_FILE,
    WEIGHTS_FILE,
    reason_of_bytes,
    reason_of_folder,
    reason_of_weights,
)
from lorary.ops.finite import is_finite
from lorary.reading import open_regular, parse_header, parse_json, read_header, read_regular, read_weights

PREFIX = "base_model.model."
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Shape(NamedTuple):
    """What the factors of one layer measure."""

    rank: int
    d_in: int
    d_out: int


def read_files(folder: Path, name: str) -> dict[str, bytes]:
    """The bytes of PEFT's two files by file name, so that what is checked is what is hashed and copied.

    Args:
        folder: a PEFT LoRA directory.
        name: label of the adapter, for errors.

    Raises:
        AdapterError: if a file is missing or cannot be read, or the weights are there as a pickle only.
    """
    try:
        config = read_regular(folder / CONFIG_FILE)
        with open_regular(folder / WEIGHTS_FILE) as file:
            return {CONFIG_FILE: config, WEIGHTS_FILE: _read_weights(name, file)}
    except AdapterError:
        raise
    except (OSError, ValueError) as error:
        reason = reason_of_folder(folder) if isinstance(error, FileNotFoundError) else None
        if reason is not None and "pickle" in reason.found:
            raise AdapterError(
                f"adapter '{name}' must be stored as safetensors: a pickle can run code and is never opened",
                found=folder / PICKLE_FILE,
                remedy=reason.remedy,
            ) from error
        where, cause = getattr(error, "filename", None) or folder, getattr(error, "strerror", None) or error
        raise AdapterError(
            f"adapter '{name}' must be a folder with {CONFIG_FILE} and {WEIGHTS_FILE}",
            found=f"{where}: {cause}" + (f"; the folder holds {reason.found}" if reason else ""),
            remedy=reason.remedy if reason else "give the folder that PEFT's save_pretrained wrote",
        ) from error


def parse_config(name: str, data: bytes) -> dict[str, Any]:
    """The object in an adapter_config.json.

    Raises:
        AdapterError: if it is not one JSON object of finite numbers.
    """
    try:
        config = parse_json(data)
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}, not an object")
        json.dumps(config, allow_nan=False)  # NaN and infinity are no JSON, and Python reads them all the same
    except (ValueError, RecursionError) as error:
        reason = reason_of_bytes(data)
        raise AdapterError(
            f"adapter '{name}': {CONFIG_FILE} must be one JSON object",
            found=reason.found if reason else error,
            remedy=reason.remedy if reason else "copy the adapter again",
        ) from error
    return config


def parse_tensors(name: str, data: bytes) -> dict[str, Tensor]:
    """The tensors in an adapter_model.safetensors, all finite.

    Raises:
        AdapterError: if the file is not whole, gives a tensor twice, or holds a NaN or an infinity.
    """
    try:
        tensors = load_tensors(data)
    except ValueError as error:
        raise _not_whole(name, data, error) from error
    _check_finite(name, data, tensors)
    return tensors


def load_tensors(data: bytes) -> dict[str, Tensor]:
    """The tensors in a safetensors file, held to the format by `lorary.reading.read_header` first.

    Raises:
        ValueError: if the file is not whole, names a tensor twice, or holds a dtype that torch does not have.
    """
    parse_header(data)
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, KeyError, RuntimeError, OverflowError, TypeError, MemoryError) as error:
        raise ValueError(f"{type(error).__name__}: {error}"[:300]) from error


def _not_whole(name: str, data: bytes, error: ValueError) -> AdapterError:
    reason = reason_of_weights(data)
    return AdapterError(
        f"adapter '{name}': {WEIGHTS_FILE} must be a whole safetensors file",
        found=reason.found if reason else str(error)[:400],
        remedy=reason.remedy if reason else "copy the adapter again: the file is truncated or damaged",
    )


def _read_weights(name: str, file: BufferedReader) -> bytes:
    try:
        return read_weights(file)
    except ValueError as error:
        file.seek(0)
        raise _not_whole(name, file.read(1000), error) from error


def _check_finite(name: str, data: bytes, tensors: Mapping[str, Tensor]) -> None:
    dtypes = {tensor.dtype for tensor in tensors.values()}
    start = 8 + int.from_bytes(data[:8], "little")
    if start < len(data) and len(dtypes) == 1 and dtypes <= {*FLOAT_DTYPES}:
        # All numbers at once, as they lie in the file behind its header: a hundredth of the calls.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # bytes cannot be written to; nobody does
            if is_finite(torch.frombuffer(data, dtype=dtypes.pop(), offset=start)):
                return
    for key, tensor in tensors.items():
        if tensor.dtype in FLOAT_DTYPES and not is_finite(tensor):
            raise AdapterError(
                f"adapter '{name}' must have finite weights",
                found=f"NaN or infinity in {key}",
                remedy="take a checkpoint from before the training diverged",
            )


def read_shapes(folder: Path, name: str) -> dict[str, Shape]:
    """The shapes of an adapter's factors, from the header of its weights alone: no weight is read.

    Arguments are those of `read_files`.

    Returns:
        By path of the layer. What is no pair of matrices is left out: reading the adapter refuses it by name.

    Raises:
        AdapterError: if the file is missing, or its header cannot be read.
    """
    try:
        with open_regular(folder / WEIGHTS_FILE) as file:
            entries = read_header(file, os.fstat(file.fileno()).st_size)
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"adapter '{name}': {WEIGHTS_FILE} must be a whole safetensors file",
            found=error,
            remedy="copy the adapter again: the file is truncated or damaged",
        ) from error
    factors: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, entry in entries.items():
        if (place := place_of(key)) is not None:
            factors.setdefault(place.path, {})[place.factor] = entry.shape
    shapes = {}
    for path, pair in factors.items():
        down, up = pair.get("A", ()), pair.get("B", ())
        if len(down) == len(up) == 2:
            shapes[path] = Shape(down[0], down[1], up[0])
    return shapes


class Place(NamedTuple):
    """The layer that a tensor belongs to, and which of its parts it is: `A`, `B`, `bias` or `magnitude`."""

    path: str
    factor: str


# What the key of each part ends with, as PEFT writes it, and otherwise as PEFT reads it too: some tools leave the name
# that PEFT gives an adapter by default in the key.
_SUFFIXES = {
    "A": (".lora_A.weight", ".lora_A.default.weight"),
    "B": (".lora_B.weight", ".lora_B.default.weight"),
    "bias": (".lora_B.bias", ".lora_B.default.bias"),
    "magnitude": (
        ".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".lora_magnitude_vector.default.weight"
    ),
}  # fmt: skip


def place_of(key: str) -> Place | None:
    """Where a tensor belongs by its key, None for what is no part of a LoRA."""
    inner = key.removeprefix(PREFIX)
    for factor, suffixes in _SUFFIXES.items():
        for suffix in suffixes:
            if key.startswith(PREFIX) and inner.endswith(suffix):
                return Place(inner.removesuffix(suffix), factor)
    return None


def key_of(path: str, factor: str) -> str:
    """The key that PEFT gives a part on disk.

    Args:
        path: of the layer.
        factor: that of `Place`.
    """
    return f"{PREFIX}{path}{_SUFFIXES[factor][0]}"
