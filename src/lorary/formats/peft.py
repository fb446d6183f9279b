"""PEFT's two files, adapter_config.json and adapter_model.safetensors: read and written exactly.

Tensors are kept bit for bit and the configuration value for value. What is no LoRA over linear layers, with a bias or a
magnitude (DoRA) or without, is refused by name, since an adapter that loads without a part of itself answers wrongly
without a sign of it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lorary.adapter import Adapter, LoraFactors
from lorary.errors import AdapterError
from lorary.formats.peft_config import check_config, new_config
from lorary.formats.peft_copies import copied_name
from lorary.formats.peft_files import (
    FLOAT_DTYPES,
    Shape,
    key_of,
    parse_config,
    parse_tensors,
    place_of,
    read_files,
    read_shapes,
)
from lorary.formats.peft_reasons import CONFIG_FILE, WEIGHTS_FILE, Reason, reason_of_key, reason_of_wrapper
from lorary.formats.peft_selection import Selection

__all__ = [
    "CONFIG_FILE", "WEIGHTS_FILE", "Shape", "encode_adapter", "new_config", "parse_adapter", "read_adapter",
    "read_files", "read_shapes", "tensors_of",
]  # fmt: skip


_NOT_HALF = Reason(
    "not half of such a pair",
    "retrain without embeddings and modules_to_save; an unpaired factor means damage",
)
# The field of the configuration that says of a further part that each layer has it.
_FURTHER = {"bias": "lora_bias", "magnitude": "use_dora"}
# Far longer than the path of any layer: what is done for each dot of a key must end.
MOST_CHARACTERS = 1000
_TOO_LONG = Reason(f"longer than {MOST_CHARACTERS} characters", "copy the adapter again: the file is damaged")
_LINE_FEED = Reason("a name with a line feed, which no layer has", "copy the adapter again: the file is damaged")
_TWICE = Reason("the second of its kind for the layer", "remove one of the two, and save the adapter again")


def read_adapter(folder: str | Path, name: str | None = None, *, with_copies: bool = False) -> Adapter:
    """Read a PEFT LoRA directory.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        name: label of the adapter; the folder's name by default.
        with_copies: let weights of the base model lie beside the factors, which the caller compares with the base's
            (see `lorary.formats.peft_copies`).

    Returns:
        The adapter on the CPU, in the dtypes of the file.

    Raises:
        AdapterError: if a file is missing or damaged, or the adapter is more than a LoRA over linear layers.
    """
    folder = Path(folder)
    name = folder.resolve().name if name is None else name
    adapter = parse_adapter(name, read_files(folder, name))
    for key in adapter.tensors:
        if copied_name(key) and not with_copies:
            raise _refused(name, key, adapter.tensors, None)
    return adapter


def parse_adapter(name: str, files: Mapping[str, bytes]) -> Adapter:
    """The adapter that PEFT's two files hold.

    Weights of the base model that lie beside the factors stay among its `tensors`; `lorary.formats.peft_copies` says
    which they are, and whether they are the base's.

    Args:
        name: label of the adapter.
        files: bytes by file name, as `read_files` gives them.

    Raises:
        AdapterError: as for `read_adapter`.
    """
    config = parse_config(name, files[CONFIG_FILE])
    check_config(name, config)
    tensors = parse_tensors(name, files[WEIGHTS_FILE])
    return Adapter(name=name, modules=_modules_of(name, config, tensors), config=config, tensors=tensors)


def _modules_of(name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, LoraFactors]:
    """Pair the factors by layer; every key must belong to a whole pair, or name a weight of the base."""
    pairs: dict[str, dict[str, str]] = {}
    for key in sorted(tensors):
        if len(key) > MOST_CHARACTERS:
            raise _refused(name, key, tensors, _TOO_LONG)
        if "\n" in key:
            raise _refused(name, key, tensors, _LINE_FEED)
        place, reason = place_of(key), reason_of_wrapper(key)
        if place is None and not reason and copied_name(key):
            continue
        if place is None or reason:
            raise _refused(name, key, tensors, reason or reason_of_key(key, list(tensors)))
        if place.factor in pairs.setdefault(place.path, {}):
            raise _refused(name, key, tensors, _TWICE)
        pairs[place.path][place.factor] = key
    for path, pair in pairs.items():
        if len(pair.keys() & {"A", "B"}) < 2:
            raise _refused(name, next(iter(pair.values())), tensors, None)
        _check_stated(name, config, path, pair)
    if not pairs:
        raise AdapterError(f"adapter '{name}' must hold LoRA factors", found=f"no tensors in {WEIGHTS_FILE}")
    selection = Selection(name, config)
    return {
        path: _factors_of(name, selection, path, {factor: tensors[key] for factor, key in pair.items()})
        for path, pair in pairs.items()
    }


def _check_stated(name: str, config: Mapping[str, Any], path: str, pair: Mapping[str, str]) -> None:
    """Refuse a layer that has a part which the configuration knows nothing of, or lacks one that it promises."""
    for factor, field in _FURTHER.items():
        if (factor in pair) != bool(config.get(field)):
            raise AdapterError(
                f"adapter '{name}' must have a {factor} at {path} if, and only if, {field} is true in {CONFIG_FILE}",
                found=f"{field} = {config.get(field)}, and {'one' if factor in pair else 'none'} in {WEIGHTS_FILE}",
                remedy="copy the adapter again: PEFT would ignore the part, or make one up",
            )


def _refused(name: str, key: str, tensors: Mapping[str, Tensor], reason: Reason | None) -> AdapterError:
    reason = reason or _NOT_HALF
    return AdapterError(
        f"adapter '{name}' must hold nothing but pairs {key_of('LAYER', 'A')} and lora_B.weight",
        found=f"{key[:200]} {tuple(tensors[key].shape)}: {reason.found}",
        remedy=reason.remedy,
    )


def _factors_of(name: str, selection: Selection, path: str, parts: Mapping[str, Tensor]) -> LoraFactors:
    lora_a, lora_b = parts["A"], parts["B"]

    def description() -> str:
        return f"lora_A {lora_a.dtype} {tuple(lora_a.shape)}, lora_B {lora_b.dtype} {tuple(lora_b.shape)}"

    if not selection.has(path):
        raise AdapterError(
            f"adapter '{name}' has weights for {path}, a layer that its adapter_config.json does not target",
            found=f"target_modules = {selection.targets!r:.200}",
            remedy="PEFT would ignore these weights: name the layer in target_modules, or remove the weights",
        )
    if {lora_a.ndim, lora_b.ndim} <= {0, 1} or (0 in (*lora_a.shape, *lora_b.shape)):
        raise AdapterError(
            f"adapter '{name}' must have at {path} two matrices (rank, d_in) and (d_out, rank), rank at least 1",
            found=f"{description()}: empty, as DeepSpeed ZeRO-3 and FSDP leave them where weights are not gathered",
            remedy="gather the weights before save_pretrained, and save the adapter again",
        )
    if not (lora_a.ndim == 2 and lora_b.ndim == 2 and lora_a.shape[0] == lora_b.shape[1]):
        raise AdapterError(
            f"adapter '{name}' must have at {path} two matrices (rank, d_in) and (d_out, rank), rank at least 1",
            found=description(),
            remedy="only linear layers can be adapted here; factors of convolutions are refused",
        )
    if lora_a.dtype != lora_b.dtype or lora_a.dtype not in FLOAT_DTYPES:
        raise AdapterError(
            f"adapter '{name}' must have both factors at {path} in one dtype of 16, 32 or 64-bit floats",
            found=description(),
            remedy="cast the adapter to one dtype and save it again",
        )
    for factor in _FURTHER.keys() & parts.keys():
        if parts[factor].shape != lora_b.shape[:1] or parts[factor].dtype not in FLOAT_DTYPES:
            raise AdapterError(
                f"adapter '{name}' must have at {path} a {factor} of shape ({lora_b.shape[0]},), of floats",
                found=f"{parts[factor].dtype} {tuple(parts[factor].shape)}",
                remedy="copy the adapter again, or retrain it on linear layers alone",
            )
    scaling = selection.scaling(path, int(lora_a.shape[0]))
    return LoraFactors(lora_a, lora_b, scaling, parts.get("bias"), parts.get("magnitude"))


def tensors_of(modules: Mapping[str, LoraFactors]) -> dict[str, Tensor]:
    """The tensors of an adapter by the keys PEFT gives them on disk.

    Args:
        modules: factors by dotted path of the layer, on any device.

    Returns:
        Copies on the CPU in the dtypes given, so that a slice of a stack of experts does not keep the stack alive.
    """
    tensors: dict[str, Tensor] = {}
    for path, factors in modules.items():
        parts = {"A": factors.lora_a, "B": factors.lora_b, "bias": factors.bias, "magnitude": factors.magnitude}
        for letter, part in parts.items():
            if part is not None:
                tensors[key_of(path, letter)] = part.detach().to("cpu", copy=True).contiguous()
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
        trained, parsed = adapter.modules.get(path), written.modules.get(path)
        if trained is None or parsed is None or not _are_equal(trained, parsed):
            raise AdapterError(
                f"adapter '{adapter.name}' must have at {path} the factors and the scaling that its files would give",
                found=f"scaling {trained and trained.scaling} in memory, {parsed and parsed.scaling} by its files",
                remedy="set r, lora_alpha and their patterns to what was trained; leave `tensors` out after a change",
            )
    return files


def _are_equal(here: LoraFactors, there: LoraFactors) -> bool:
    if here.scaling != there.scaling or (here.bias is None, here.magnitude is None) != (
        there.bias is None, there.magnitude is None
    ):  # fmt: skip
        return False
    return all(torch.equal(a.detach().cpu(), b) for a, b in zip(here.tensors, there.tensors, strict=True))
