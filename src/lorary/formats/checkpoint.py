"""What a transformers folder says a base model is: its configuration, and which file holds each of its tensors.

Nothing is built here, and no weight is read. What is out of range is refused before transformers could act on it.
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorary.errors import BaseModelError
from lorary.reading import open_regular, read_header, read_json

CONFIG_FILE = "config.json"
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
AGAIN = "copy or download the model again"

# Sizes under the names that transformers' families give them; each is a whole number from 1 where it is given.
_SIZES = frozenset(
    {
        "hidden_size", "n_embd", "d_model", "vocab_size", "head_dim", "max_position_embeddings", "n_positions",
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_attention_heads", "n_head", "n_heads",
        "num_key_value_heads",
    }
)  # fmt: skip
_LAYERS = frozenset({"num_hidden_layers", "n_layer", "n_layers", "num_layers"})
# More than any model has; so many and more are believed where the checkpoint has as many tensors.
MANY_LAYERS = 1000
# Names of classes, which a language model has no use for, and transformers checks one by one.
_LABELS = frozenset({"id2label", "label2id", "num_labels"})
MOST_LABELS = 10_000
# Fields of a configuration that send transformers to another file than the ones named above.
_ELSEWHERE = ("transformers_weights", "configuration_files")


def read_config(folder: Path, label: str, remedy: str = AGAIN) -> dict[str, Any]:
    """The fields of config.json, checked for what no model can have.

    Args:
        folder: of the model.
        label: the model in error messages.
        remedy: what to do where there is no config.json.

    Raises:
        BaseModelError: if there is none, it is no JSON object, or a number in it is out of range; names the field.
    """
    try:
        config = read_json(folder / CONFIG_FILE)
    except FileNotFoundError as error:
        raise BaseModelError(
            f"the base model {label} must hold {CONFIG_FILE}", found="no such file", remedy=remedy
        ) from error
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"{CONFIG_FILE} of the base model {label} must be readable JSON",
            found=getattr(error, "strerror", None) or error,
            remedy=AGAIN,
        ) from error
    if not isinstance(config, dict):
        raise BaseModelError(
            f"{CONFIG_FILE} of the base model {label} must be a JSON object",
            found=type(config).__name__,
            remedy=AGAIN,
        )
    for name in _LABELS & config.keys():
        _check_labels(name, config[name], label)
    for name, value in _fields(config):
        _check_field(name, value, label)
    return config


def _check_labels(name: str, value: Any, label: str) -> None:
    number = len(value) if isinstance(value, dict | list) else value
    if isinstance(number, int) and number > MOST_LABELS:
        raise _out_of_range(name, f"{number:,} labels", label, f"be {MOST_LABELS:,} at most")


def _fields(config: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value of a document under its last name."""
    if isinstance(config, dict):
        for key, value in config.items():
            # How transformers writes floats that JSON has no word for.
            yield from _fields(value, name if key == "__float__" else str(key))
    elif isinstance(config, list):
        for value in config:
            yield from _fields(value, name)
    else:
        yield name, config


def _check_field(name: str, value: Any, label: str) -> None:
    if name in _ELSEWHERE and value is not None:
        raise BaseModelError(
            f"the weights of the base model {label} must lie in {SINGLE_FILE} or the files that {INDEX_FILE} names",
            found=f"'{name}' in {CONFIG_FILE}, which names other files",
            remedy="save the model again with save_pretrained() of transformers",
        )
    if name in _SIZES and value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise _out_of_range(name, value, label, "be a whole number from 1")
    if isinstance(value, int) and abs(value) > 2**63:
        raise _out_of_range(name, f"a number of {len(hex(value)) - 2} hexadecimal digits", label, "fit 64 bits")
    if value == "NaN" or (isinstance(value, float) and math.isnan(value)):
        raise _out_of_range(name, "NaN", label, "be a number")
    # Mamba's limits of a time step may lie at infinity.
    is_infinite = value in ("Infinity", "-Infinity") or (isinstance(value, float) and math.isinf(value))
    if is_infinite and not name.endswith(("limit", "limits")):
        raise _out_of_range(name, value, label, "be finite")


def _out_of_range(name: str, value: object, label: str, rule: str) -> BaseModelError:
    return BaseModelError(
        f"'{name}' in {CONFIG_FILE} of the base model {label} must {rule}",
        found=value if not isinstance(value, str) else repr(value[:80]),
        remedy=AGAIN,
    )


def check_layers(config: Mapping[str, Any], files: Mapping[str, Path], label: str) -> None:
    """Refuse a configuration of more layers than the checkpoint has tensors, before anything is built from it.

    Raises:
        BaseModelError: naming the field.
    """
    for name, value in _fields(dict(config)):
        if name in _LAYERS and isinstance(value, int) and value > max(MANY_LAYERS, len(files)):
            raise _out_of_range(name, value, label, f"be borne out by its {len(files)} tensors")


def weight_files(folder: Path, label: str) -> dict[str, Path]:
    """The file that holds each tensor of a checkpoint.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json and the files that it names.
        label: the model in error messages.

    Raises:
        BaseModelError: if there is neither, the index names anything but safetensors files of this folder, or one of
            these is missing or damaged; names the file.
    """
    if (folder / SINGLE_FILE).exists():
        return dict.fromkeys(_tensors_in(folder / SINGLE_FILE, label), folder / SINGLE_FILE)
    names = shard_names(folder, label)
    stored = {name: set(_tensors_in(folder / name, label)) for name in sorted(set(names.values()))}
    for tensor, name in names.items():
        if tensor not in stored[name]:
            raise BaseModelError(
                f"the file {name} of the base model {label} must hold what {INDEX_FILE} says",
                found=f"no tensor {tensor}",
                remedy=AGAIN,
            )
    # All that a file holds is loaded, whatever the index says of it.
    return {tensor: folder / name for name, tensors in stored.items() for tensor in tensors}


def shard_names(folder: Path, label: str) -> dict[str, str]:
    """The file name of each tensor by the index of a checkpoint.

    Raises:
        BaseModelError: if the index is damaged, or a name is no safetensors file of the folder itself.
    """
    try:
        index = read_json(folder / INDEX_FILE)
        names = dict(index.get("weight_map", {}))
    except FileNotFoundError as error:
        raise _no_weights(folder, label) from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BaseModelError(
            f"{INDEX_FILE} of the base model {label} must be a JSON object that names the file of each tensor",
            found=getattr(error, "strerror", None) or error,
            remedy=AGAIN,
        ) from error
    for tensor, name in names.items():
        is_plain = isinstance(name, str) and name == Path(name).name and "\\" not in name and "\0" not in name
        if not is_plain or not name.endswith(".safetensors") or name.startswith("."):
            raise BaseModelError(
                f"{INDEX_FILE} of the base model {label} must name safetensors files of its own folder only; "
                "pickled weights are never opened",
                found=f"{str(name)[:120]!r} for the tensor {tensor[:120]}",
                remedy="save it again with save_pretrained() of transformers, which writes safetensors",
            )
    return names


def _tensors_in(file: Path, label: str) -> list[str]:
    try:
        # A FIFO or a device would hold up the reader of safetensors for ever.
        with open_regular(file) as opened:
            return list(read_header(opened, os.fstat(opened.fileno()).st_size))
    except (OSError, ValueError) as error:
        is_missing = isinstance(error, FileNotFoundError)
        raise BaseModelError(
            f"the weights of the base model {label} must load from {file.name} of its folder",
            found="no such file" if is_missing else getattr(error, "strerror", None) or str(error)[:300],
            remedy=AGAIN,
        ) from error


def _no_weights(folder: Path, label: str) -> BaseModelError:
    pickled = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
    return BaseModelError(
        f"the base model {label} must have its weights as safetensors; pickled weights are never opened",
        found=", ".join(pickled) or f"no {SINGLE_FILE} and no {INDEX_FILE}",
        remedy="save it again with save_pretrained() of transformers, which writes safetensors",
    )
