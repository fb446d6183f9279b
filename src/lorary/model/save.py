"""A whole routed model on disk: base, library, router. JSON and safetensors only.

model.json             format version, base, seats, router
library/               a library of the seated experts
base/                  the base model, where it cannot be referred to
prepared.safetensors   what rules need beyond weights, where there is such
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from lorary.errors import BaseModelError, LibraryError, LoraryError, RouterError, UsageError
from lorary.formats.base import BaseFiles, check_folder, resolve_base
from lorary.formats.peft_files import FLOAT_DTYPES, load_tensors
from lorary.formats.pretrained import plain_generation
from lorary.formats.quiet import quiet_transformers
from lorary.library.base_weights import is_plain
from lorary.library.copying import copy_library
from lorary.library.files import encode_json, read_json, reported, write_file
from lorary.library.fingerprint import bare_modules, compare, fingerprint_of_model
from lorary.library.fingerprint_folder import fingerprint_of_folder
from lorary.library.folders import check_name
from lorary.library.listing import check_path
from lorary.library.store import Library
from lorary.lora.seat import linear_shape
from lorary.model.apply import apply_routing
from lorary.model.attach import seat_library
from lorary.model.base import DTYPES, choose_device, load_model
from lorary.model.check_seated import check_unchanged
from lorary.model.prepared import PreparedTensors
from lorary.model.seating import Seating, seating
from lorary.ops.finite import is_finite
from lorary.reading import open_regular, read_weights
from lorary.route.setting import Routing

MODEL_FILE = "model.json"
PREPARED_FILE = "prepared.safetensors"
BUFFERS_FILE = "buffers.safetensors"
FORMAT_VERSION = 1


def save(model: Any, path: str | Path, *, copy_base: bool | None = None) -> Path:
    """Write a routed model to a folder from which `lorary.load` gives the same logits, bit for bit.

    Args:
        model: a routed model.
        path: a folder that does not exist or is empty.
        copy_base: write the base model's weights too; only its name where False. By default they are written unless
            its own files are at hand, with the architecture, shapes and sampled values of the model.

    Returns:
        The folder.

    Raises:
        UsageError: if the model is not routed, the folder is taken, or the base has no files to refer to.
        LibraryError: if an adapter of the library changed since it was seated, or the folder cannot be written.
        BaseModelError: if the base is no model that can be loaded again, such as a quantised one.
    """
    check_path(path, "a saved model")
    state, target = seating(model), Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError("a routed model must be saved to a folder of its own", found=f"{target} is taken")
    base = None if copy_base else _reference(model, state)
    if base is None and copy_base is False:
        raise UsageError(
            "the base model must have files to be referred to", found=model.name_or_path, remedy="copy_base=True"
        )
    if base is None:
        _check_plain(model)
    check_unchanged(state.library, state.experts, state.layers, state.live)
    is_new = not target.exists()
    try:
        with reported(target):
            target.mkdir(parents=True, exist_ok=True)
            _write(model, state, target, base)
    except BaseException:
        for entry in list(target.iterdir()) if target.is_dir() else ():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if is_new:
            target.rmdir()
        raise
    return target


def load(path: str | Path, *, device: str = "auto") -> Any:
    """Load a routed model that `lorary.save` wrote.

    Args:
        path: its folder.
        device: as for `lorary.load_base`.

    Returns:
        The model: a transformers model with the experts seated in it.

    Raises:
        UsageError: if there is no such folder.
        LibraryError: if it is damaged, or a newer Lorary wrote it.
        BaseModelError: if its base model is not where it was, or another one.
    """
    check_path(path, "a saved model")
    folder = Path(path)
    if not (folder / MODEL_FILE).is_file():
        raise UsageError(f"{folder} must be a saved routed model", found=f"no {MODEL_FILE} in it")
    document = read_json(folder / MODEL_FILE, follow_links=True)
    if document.get("format_version") != FORMAT_VERSION:
        raise LibraryError(
            f"{folder / MODEL_FILE} must have format version {FORMAT_VERSION}",
            found=document.get("format_version"),
            remedy="pip install --upgrade lorary, or save the model again",
        )
    try:
        base, setting, seats = (
            document["base"],
            Routing.of(**document["routing"]),
            [str(name) for name in document["seats"]],
        )
        reference, dtype, attention = base["reference"], DTYPES[base["dtype"]], base["attention"]
        for name in seats:
            check_name(name)
    except (KeyError, TypeError, AttributeError, UsageError, RouterError) as error:
        raise LibraryError(
            f"{folder / MODEL_FILE} must say base, seats and routing", found=repr(error), remedy="save the model again"
        ) from error
    files = BaseFiles(str(folder / "base"), folder / "base", None) if reference is None else resolve_base(reference)
    check_folder(files.path, name=files.name)
    model: Any = load_model(files, dtype, choose_device(device), attn_implementation=attention)
    _put_buffers(model, folder / BUFFERS_FILE)
    if model.generation_config is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = base.get("pad_token_id")
    # Seated without its router, which may need what was prepared.
    seat_library(model, Library.open(folder / "library"), Routing("base"), seats=seats)
    state = seating(model)
    state.prepared = _read_prepared(folder)
    apply_routing(model, state, setting)
    return model


def _write(model: Any, state: Seating, target: Path, base: str | None) -> None:
    copied = [name for name in state.experts if name not in state.live]
    copy_library(state.library, target / "library", copied, state.live)
    if base is None:
        with quiet_transformers(), _plain_generation(model):
            model.save_pretrained(target / "base")
            if state.tokenizer is not None:
                state.tokenizer.save_pretrained(target / "base")
        check_folder(target / "base")
    # A model that was cast after it was loaded has cast these too, which loading would compute anew in float32.
    write_file(target / BUFFERS_FILE, safetensors.torch.save(_unsaved_buffers(model)))
    if state.prepared:
        write_file(target / PREPARED_FILE, safetensors.torch.save(_flat(state)))
    document = {
        "format_version": FORMAT_VERSION,
        "base": {
            "reference": base,
            "dtype": str(model.dtype).removeprefix("torch."),
            "attention": model.config._attn_implementation,
            "pad_token_id": getattr(model.generation_config, "pad_token_id", None),
        },
        "seats": list(state.seats),
        "routing": state.routing.to_json(),
    }
    write_file(target / MODEL_FILE, encode_json(document))


def _check_plain(model: Any) -> None:
    """Refuse to write a quantised base: its layers would be read as others."""
    for path, module in bare_modules(model):
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if linear_shape(module) and not all(tensor.is_meta or is_plain(tensor) for tensor in tensors):
            raise BaseModelError(
                "the base model must hold its weights as floating-point numbers to be saved",
                found=f"layer '{path}' ({type(module).__name__}) is quantised",
                remedy="keep the library; quantise the base again, and lorary.attach(model, library)",
            )


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Keep a base's own generation defaults out of what is saved: some cannot be saved, none is loaded."""
    defaults = model.generation_config
    model.generation_config = None if defaults is None else plain_generation(defaults)
    try:
        yield
    finally:
        model.generation_config = defaults


def _reference(model: Any, state: Seating) -> str | None:
    """What to call the base by, where the files of that name hold this very model."""
    fingerprint = fingerprint_of_model(model)
    for name in (state.library.base.name, getattr(model, "name_or_path", "")):
        # A Hub id is not asked for: nothing talks to the network unless it is told to.
        is_local = name == "embedded" or Path(name or " ").exists()
        if not is_local:
            continue
        try:
            files = resolve_base(name)
            if compare(fingerprint_of_folder(files.path), fingerprint) == "same":
                return files.name
        except LoraryError:
            continue
    return None


def _flat(state: Seating) -> dict[str, torch.Tensor]:
    return {
        f"{kind}/{name}/{path}": tensor.contiguous()
        for kind, by_name in state.prepared.items()
        for name, by_path in by_name.items()
        for path, tensor in by_path.items()
    }


def _unsaved_buffers(model: Any) -> dict[str, torch.Tensor]:
    """The base's buffers that are no part of its state dict, by name."""
    buffers = {}
    for path, module in bare_modules(model):
        for name in sorted(module._non_persistent_buffers_set):
            buffer = module._buffers[name]
            if buffer is not None:
                # Copied: a file cannot hold one tensor under two names.
                buffers[f"{path}.{name}".lstrip(".")] = buffer.detach().cpu().clone()
    return buffers


def _put_buffers(model: Any, path: Path) -> None:
    """Give a model the buffers that were computed in float32.

    Raises:
        LibraryError: if one is none of the model's, or of another shape.
    """
    buffers = {name: buffer.shape for name, buffer in model.named_buffers(remove_duplicate=False)}
    for name, buffer in _read_tensors(path).items():
        if buffers.get(name) != buffer.shape:
            raise LibraryError(
                f"{path} must hold buffers of the base model",
                found=f"{name[:200]} {tuple(buffer.shape)}, where the model has {buffers.get(name)}",
                remedy="save the model again",
            )
        module, _, last = name.rpartition(".")
        model.get_submodule(module)._buffers[last] = buffer.to(model.device)


def _read_prepared(folder: Path) -> dict[str, PreparedTensors]:
    prepared: dict[str, Any] = {}
    if (folder / PREPARED_FILE).is_file():
        for key, tensor in _read_tensors(folder / PREPARED_FILE).items():
            kind, name, path = [*key.split("/", 2), "", ""][:3]
            is_number = not tensor.is_floating_point() or (tensor.dtype in FLOAT_DTYPES and is_finite(tensor))
            if not path or not is_number:
                raise LibraryError(
                    f"{folder / PREPARED_FILE} must hold finite tensors by kind, expert and layer",
                    found=key[:200],
                    remedy="save the model again",
                )
            prepared.setdefault(kind, {}).setdefault(name, {})[path] = tensor
    return prepared


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with open_regular(path) as file:
            return load_tensors(read_weights(file))
    except (OSError, ValueError) as error:
        raise LibraryError(f"{path} must be whole", found=error, remedy="save the model again") from error
