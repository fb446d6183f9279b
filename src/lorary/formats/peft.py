"""PEFT's two files, adapter_config.json and adapter_model.safetensors: read and written exactly.

Tensors are kept bit for bit and the configuration value for value. What is not a plain LoRA over linear layers is
refused by name, since an adapter that loads without a part of itself answers wrongly without a sign of it.
"""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from lorary.adapter import Adapter, LoraFactors
from lorary.errors import AdapterError
from lorary.formats.peft_config import check_config, is_targeted, new_config, scaling_of

__all__ = [
    "CONFIG_FILE", "WEIGHTS_FILE", "Shape", "encode_adapter", "new_config", "parse_adapter", "read_adapter",
    "read_files", "read_shapes", "tensors_of", "write_adapter",
]  # fmt: skip

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
PREFIX = "base_model.model."
SUFFIX_A, SUFFIX_B = ".lora_A.weight", ".lora_B.weight"
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Shape(NamedTuple):
    """What the factors of one layer measure."""

    rank: int
    d_in: int
    d_out: int


def read_adapter(folder: str | Path, name: str | None = None) -> Adapter:
    """Read a PEFT LoRA directory.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        name: label of the adapter; the folder's name by default.

    Returns:
        The adapter on the CPU, in the dtypes of the file.

    Raises:
        AdapterError: if a file is missing or damaged, or the adapter is more than a plain LoRA over linear layers.
    """
    folder = Path(folder)
    name = folder.resolve().name if name is None else name
    return parse_adapter(name, read_files(folder, name))


def read_files(folder: Path, name: str) -> dict[str, bytes]:
    """The bytes of PEFT's two files by file name, so that what is checked is what is hashed and copied.

    Args:
        folder: a PEFT LoRA directory.
        name: label of the adapter, for errors.

    Raises:
        AdapterError: if a file is missing or cannot be read, or the weights are there as a pickle only.
    """
    if not (folder / WEIGHTS_FILE).exists() and (folder / PICKLE_FILE).exists():
        raise AdapterError(
            f"adapter '{name}' must be stored as safetensors: a pickle can run code and is never opened",
            found=folder / PICKLE_FILE,
            remedy="load it in PEFT where you trust it and save it with safe_serialization=True",
        )
    try:
        return {file: (folder / file).read_bytes() for file in (CONFIG_FILE, WEIGHTS_FILE)}
    except OSError as error:
        raise AdapterError(
            f"adapter '{name}' must be a folder with {CONFIG_FILE} and {WEIGHTS_FILE}",
            found=f"{error.filename or folder}: {error.strerror}",
            remedy="give the folder that PEFT's save_pretrained wrote",
        ) from error


def parse_adapter(name: str, files: Mapping[str, bytes]) -> Adapter:
    """The adapter that PEFT's two files hold.

    Args:
        name: label of the adapter.
        files: bytes by file name, as `read_files` gives them.

    Raises:
        AdapterError: as for `read_adapter`.
    """
    config = _parse_config(name, files[CONFIG_FILE])
    tensors = _parse_tensors(name, files[WEIGHTS_FILE])
    check_config(name, config)
    return Adapter(name=name, modules=_modules_of(name, config, tensors), config=config, tensors=tensors)


def _parse_config(name: str, data: bytes) -> dict[str, Any]:
    def refuse_constant(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        config = json.loads(data.decode("utf-8"), parse_constant=refuse_constant)
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}, not an object")
    except (ValueError, RecursionError) as error:
        raise AdapterError(
            f"adapter '{name}': {CONFIG_FILE} must be one JSON object", found=error, remedy="copy the adapter again"
        ) from error
    return config


def _parse_tensors(name: str, data: bytes) -> dict[str, Tensor]:
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise AdapterError(
            f"adapter '{name}': {WEIGHTS_FILE} must be a whole safetensors file",
            found=f"{error} ({len(data)} bytes)",
            remedy="copy the adapter again: the file is truncated or damaged",
        ) from error
    _check_finite(name, data, tensors)
    return tensors


def _check_finite(name: str, data: bytes, tensors: Mapping[str, Tensor]) -> None:
    dtypes = {tensor.dtype for tensor in tensors.values()}
    start = 8 + int.from_bytes(data[:8], "little")
    if start < len(data) and len(dtypes) == 1 and dtypes <= {*FLOAT_DTYPES}:
        # All numbers at once, as they lie in the file behind its header: a hundredth of the calls.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # bytes cannot be written to; nobody does
            if bool(torch.frombuffer(data, dtype=dtypes.pop(), offset=start).isfinite().all()):
                return
    for key, tensor in tensors.items():
        if tensor.dtype in FLOAT_DTYPES and not bool(torch.isfinite(tensor).all()):
            raise AdapterError(
                f"adapter '{name}' must have finite weights",
                found=f"NaN or infinity in {key}",
                remedy="take a checkpoint from before the training diverged",
            )


def read_shapes(folder: Path, name: str) -> dict[str, Shape]:
    """The shapes of an adapter's factors, from the header of its weights alone: no weight is read.

    Args:
        folder: a PEFT LoRA directory.
        name: label of the adapter, for errors.

    Returns:
        By path of the layer. What is no pair of matrices is left out: reading the adapter refuses it by name.

    Raises:
        AdapterError: if the file is missing, or its header cannot be read.
    """
    try:
        with safetensors.safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            found = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"adapter '{name}': {WEIGHTS_FILE} must be a whole safetensors file",
            found=error,
            remedy="copy the adapter again: the file is truncated or damaged",
        ) from error
    shapes = {}
    for key, down in found.items():
        up = found.get(key.removesuffix(SUFFIX_A) + SUFFIX_B, ())
        if key.startswith(PREFIX) and key.endswith(SUFFIX_A) and len(down) == len(up) == 2:
            shapes[key.removeprefix(PREFIX).removesuffix(SUFFIX_A)] = Shape(down[0], down[1], up[0])
    return shapes


def _modules_of(name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, LoraFactors]:
    """Pair the factors by layer; every key must belong to a whole pair."""
    modules: dict[str, LoraFactors] = {}
    for key in sorted(tensors):
        path = key.removeprefix(PREFIX).removesuffix(SUFFIX_A).removesuffix(SUFFIX_B)
        key_a, key_b = f"{PREFIX}{path}{SUFFIX_A}", f"{PREFIX}{path}{SUFFIX_B}"
        if key not in (key_a, key_b) or key_a not in tensors or key_b not in tensors:
            raise AdapterError(
                f"adapter '{name}' must hold nothing but pairs {PREFIX}LAYER{SUFFIX_A} and {SUFFIX_B[1:]}",
                found=f"{key} {tuple(tensors[key].shape)}, which is not half of such a pair",
                remedy="retrain without embeddings, DoRA, biases and modules_to_save; an unpaired factor means damage",
            )
        if key == key_a:
            modules[path] = _factors_of(name, config, path, tensors[key_a], tensors[key_b])
    if not modules:
        raise AdapterError(f"adapter '{name}' must hold LoRA factors", found=f"no tensors in {WEIGHTS_FILE}")
    return modules


def _factors_of(name: str, config: Mapping[str, Any], path: str, lora_a: Tensor, lora_b: Tensor) -> LoraFactors:
    def found() -> str:
        return f"lora_A {lora_a.dtype} {tuple(lora_a.shape)}, lora_B {lora_b.dtype} {tuple(lora_b.shape)}"

    are_matrices = lora_a.ndim == 2 and lora_b.ndim == 2 and lora_a.shape[0] == lora_b.shape[1]
    if not are_matrices or 0 in (*lora_a.shape, *lora_b.shape):
        raise AdapterError(
            f"adapter '{name}' must have at {path} two matrices (rank, d_in) and (d_out, rank), rank at least 1",
            found=found(),
            remedy="only linear layers can be adapted here; factors of convolutions are refused",
        )
    if lora_a.dtype != lora_b.dtype or lora_a.dtype not in FLOAT_DTYPES:
        raise AdapterError(
            f"adapter '{name}' must have both factors at {path} in one dtype of 16, 32 or 64-bit floats",
            found=found(),
            remedy="cast the adapter to one dtype and save it again",
        )
    if not is_targeted(config, path):
        raise AdapterError(
            f"adapter '{name}' has weights for {path}, a layer that its adapter_config.json does not target",
            found=f"target_modules = {config.get('target_modules')!r}",
            remedy="PEFT would ignore these weights: name the layer in target_modules, or remove the weights",
        )
    return LoraFactors(lora_a, lora_b, scaling_of(name, config, path, int(lora_a.shape[0])))


def tensors_of(modules: Mapping[str, LoraFactors]) -> dict[str, Tensor]:
    """The tensors of an adapter by the keys PEFT gives them on disk.

    Args:
        modules: factors by dotted path of the layer, on any device.

    Returns:
        Copies on the CPU in the dtypes given, so that a slice of a stack of experts does not keep the stack alive.
    """
    tensors: dict[str, Tensor] = {}
    for path, factors in modules.items():
        for suffix, factor in ((SUFFIX_A, factors.lora_a), (SUFFIX_B, factors.lora_b)):
            tensors[f"{PREFIX}{path}{suffix}"] = factor.detach().to("cpu", copy=True).contiguous()
    return tensors


def encode_adapter(adapter: Adapter) -> dict[str, bytes]:
    """PEFT's two files for an adapter: equal adapters give equal bytes.

    Args:
        adapter: read from disk, or made here with a configuration from `new_config`.

    Returns:
        Bytes by file name.

    Raises:
        AdapterError: if the configuration does not describe the factors, so that PEFT would compute another function.
    """
    tensors = dict(adapter.tensors) or tensors_of(adapter.modules)
    # The order inside rank_pattern and alpha_pattern decides which pattern wins, so keys are not sorted here.
    config = json.dumps(dict(adapter.config), indent=2, ensure_ascii=False) + "\n"
    files = {
        CONFIG_FILE: config.encode(),
        WEIGHTS_FILE: safetensors.torch.save(tensors, metadata={"format": "pt"}),
    }
    written = parse_adapter(adapter.name, files)
    for path in sorted(set(adapter.modules) | set(written.modules)):
        here, there = adapter.modules.get(path), written.modules.get(path)
        if here is None or there is None or not _are_equal(here, there):
            raise AdapterError(
                f"adapter '{adapter.name}' must have at {path} the factors and the scaling that its files would give",
                found=f"scaling {here and here.scaling} in memory, {there and there.scaling} by its files",
                remedy="set r, lora_alpha and their patterns to what was trained; leave `tensors` out after a change",
            )
    return files


def _are_equal(here: LoraFactors, there: LoraFactors) -> bool:
    factors = ((here.lora_a, there.lora_a), (here.lora_b, there.lora_b))
    return here.scaling == there.scaling and all(torch.equal(left.detach().cpu(), right) for left, right in factors)


def write_adapter(adapter: Adapter, folder: str | Path) -> None:
    """Write a PEFT LoRA directory; files of these two names that are there already are replaced.

    Args:
        adapter: what to write.
        folder: made where it does not exist.

    Raises:
        AdapterError: as for `encode_adapter`, or if the folder cannot be written.
    """
    folder, files = Path(folder), encode_adapter(adapter)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The weights come first: a folder with a configuration is a folder whose weights are whole.
        for file in (WEIGHTS_FILE, CONFIG_FILE):
            aside = folder / f".{file}.{os.getpid()}"
            try:
                aside.write_bytes(files[file])
                os.replace(aside, folder / file)
            finally:
                aside.unlink(missing_ok=True)
    except OSError as error:
        raise AdapterError(
            f"adapter '{adapter.name}' must be written to a folder with room in it",
            found=f"{error.filename or folder}: {error.strerror}",
            remedy="free some space, or choose a folder that you may write to",
        ) from error
