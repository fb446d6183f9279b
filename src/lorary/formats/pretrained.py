"""Building a base model from its configuration and its named weights, and from nothing else that lies beside them.

transformers applies an adapter that it finds in a model's folder, takes generation defaults from there, and may be
sent to other files by fields of the configuration. So it is shown a folder that holds config.json and the checkpoint's
own files alone.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import safe_open

from lorary.errors import BaseModelError, UsageError
from lorary.formats.checkpoint import (
    AGAIN,
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    check_layers,
    read_config,
    weight_files,
)  # fmt: skip
from lorary.formats.quiet import quiet_transformers
from lorary.reading import read_json

# No weight takes less than a bit.
WEIGHTS_PER_BYTE = 8
# What a small model may compute for itself (masks, tables of positions), whatever the size of its checkpoint.
FREE_ENTRIES = 2**28


@contextmanager
def bare_folder(folder: Path, label: str) -> Iterator[Path]:
    """A folder that holds the configuration and the weights of a base model as links, and nothing else.

    Args:
        folder: of the base model.
        label: the model in error messages.

    Raises:
        BaseModelError: if configuration or weights are not there, or name what they may not.
        UsageError: if there is no room for a temporary folder.
    """
    config, files = read_config(folder, label), weight_files(folder, label)
    check_layers(config, files, label)
    _forget_outside_padding(config)
    with ExitStack() as stack:
        try:
            bare = Path(stack.enter_context(TemporaryDirectory(prefix="lorary-base-", ignore_cleanup_errors=True)))
            (bare / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
            for file in set(files.values()):
                (bare / file.name).symlink_to(file.resolve())
            if not (bare / SINGLE_FILE).exists():
                (bare / INDEX_FILE).symlink_to((folder / INDEX_FILE).resolve())
        except OSError as error:
            raise UsageError(
                f"a temporary folder must take the configuration of the base model {label}, and links to its weights",
                found=f"{error.filename}: {error.strerror}",
                remedy="free some space, or set TMPDIR to a folder that can be written",
            ) from error
        yield bare


def _forget_outside_padding(config: dict[str, Any]) -> None:
    """Drop a padding id that the embedding has no row for: it only names a row that is never trained."""
    rows, padding = config.get("vocab_size"), config.get("pad_token_id")
    if isinstance(rows, int) and isinstance(padding, int) and padding >= rows:
        config["pad_token_id"] = None


def empty_model(folder: Path) -> Any:
    """The model that a folder describes, on the meta device.

    Args:
        folder: holds config.json and safetensors.

    Raises:
        BaseModelError: if the folder lacks either, or transformers cannot build the model.
    """
    with bare_folder(folder, str(folder)) as bare:
        return _empty(bare, str(folder))


def load_pretrained(folder: Path, label: str, dtype: Any = "auto", **settings: Any) -> tuple[Any, Mapping[str, Any]]:
    """The model of a folder on the CPU, and transformers' account of which weights it missed or left over.

    Args:
        folder: holds config.json and safetensors.
        label: the model in error messages.
        dtype: of its weights; as stored by default.
        settings: further arguments of `from_pretrained`.

    Raises:
        BaseModelError: if the folder lacks either, or transformers cannot load the model.
    """
    # Imported here: it takes seconds, and commands that only look at files come through this room.
    from transformers import AutoModelForCausalLM

    ends = _ids_that_end(folder, label)
    with bare_folder(folder, label) as bare:
        empty = _empty(bare, label)
        _check_size(empty, bare, label)
        _check_kinds(empty, weight_files(bare, label), label)
        try:
            with quiet_transformers():
                model, report = AutoModelForCausalLM.from_pretrained(
                    bare,
                    dtype=dtype,
                    # Without this transformers would fall back to a pickled file.
                    use_safetensors=True,
                    local_files_only=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    **settings,
                )
        except Exception as error:  # transformers raises all kinds over a file that it cannot read
            if "mismatch" in str(error) and (mismatch := _other_shape(empty, weight_files(bare, label))):
                raise BaseModelError(
                    f"the weights of the base model {label} must have the shapes that its {CONFIG_FILE} asks for",
                    found=mismatch,
                    remedy=AGAIN,
                ) from error
            raise not_loaded("weights", label, folder, error) from error
    model.name_or_path = model.config.name_or_path = str(folder)
    if model.generation_config is not None:
        model.generation_config = plain_generation(model.generation_config)
        if ends is not None:
            model.generation_config.eos_token_id = ends
    return model, report


def plain_generation(config: Any) -> Any:
    """The generation configuration of a model without what its checkpoint likes to sample with.

    Args:
        config: a `GenerationConfig`.

    Returns:
        Another, that says which tokens begin, end and pad a text, and leaves all else at transformers' defaults.
    """
    from transformers import GenerationConfig  # as above

    return GenerationConfig(
        eos_token_id=config.eos_token_id, bos_token_id=config.bos_token_id, pad_token_id=config.pad_token_id
    )


def _empty(bare: Path, label: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with quiet_transformers(), torch.device("meta"):
            # Code that comes with a model is never run.
            config = AutoConfig.from_pretrained(bare, local_files_only=True, trust_remote_code=False)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # as above
        raise BaseModelError(
            f"transformers must be able to build the base model {label} from its {CONFIG_FILE}",
            found=_first_line(error),
            remedy=f"{AGAIN}; a family newer than the installed transformers needs a newer one",
        ) from error


def _check_size(model: Any, bare: Path, label: str) -> None:
    """Refuse a configuration of more weights than the checkpoint can hold, before memory is taken for them."""
    num_bytes = sum(file.stat().st_size for file in bare.glob("*.safetensors"))
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    num_entries = sum(buffer.numel() for buffer in model.buffers())
    most = WEIGHTS_PER_BYTE * num_bytes
    if num_weights > most or num_entries > most + FREE_ENTRIES:
        raise BaseModelError(
            f"the sizes in {CONFIG_FILE} of the base model {label} must be those of its weights",
            found=f"{max(num_weights, num_entries):,} weights by the configuration, {num_bytes:,} bytes in the files",
            remedy=AGAIN,
        )


def _check_kinds(empty: Any, files: Mapping[str, Path], label: str) -> None:
    """Refuse weights that are stored as whole or complex numbers: without a quantisation they would be cast."""
    if getattr(empty.config, "quantization_config", None) is not None:
        return
    for name, _, tensor in _stored(empty, files):
        if not (kind := str(tensor.get_dtype())).startswith(("F", "BF")):
            raise BaseModelError(
                f"the weights of the base model {label} must be stored as floating-point numbers",
                found=f"{name} is stored as {kind}, and {CONFIG_FILE} names no quantization_config",
                remedy=f"{AGAIN}, or save it again with save_pretrained() of transformers",
            )


def _other_shape(empty: Any, files: Mapping[str, Path]) -> str | None:
    """The first weight that is stored in another shape than the model has it, in words; None if there is none."""
    for name, parameter, tensor in _stored(empty, files):
        if (shape := tuple(tensor.get_shape())) != tuple(parameter.shape):
            return f"{name} is stored as {shape}, the configuration asks for {tuple(parameter.shape)}"
    return None


def _stored(empty: Any, files: Mapping[str, Path]) -> Iterator[tuple[str, Any, Any]]:
    """Name, parameter and stored slice of the weights that a checkpoint has under the names of the model."""
    with ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in set(files.values())}
        for name, parameter in empty.named_parameters():
            keys = (name, name.removeprefix(f"{empty.base_model_prefix}."))
            stored = next((key for key in keys if key in files), None)
            if stored is not None and parameter.is_floating_point():
                yield name, parameter, opened[files[stored]].get_slice(stored)


def _ids_that_end(folder: Path, label: str) -> int | list[int] | None:
    """The tokens that end an answer by generation_config.json, the one thing that is taken from there."""
    try:
        document = read_json(folder / "generation_config.json")
        ends = document.get("eos_token_id")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise BaseModelError(
            f"generation_config.json of the base model {label} must be a JSON object: it says what ends an answer",
            found=getattr(error, "strerror", None) or error,
            remedy=f"{AGAIN}, or remove the file",
        ) from error
    listed = ends if isinstance(ends, list) else [ends]
    if ends is not None and any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in listed):
        raise BaseModelError(
            f"'eos_token_id' in generation_config.json of the base model {label} must be token ids",
            found=str(ends)[:120],
            remedy=f"{AGAIN}, or remove the file",
        )
    return ends or None if isinstance(ends, list) else ends


def not_loaded(part: str, label: str, folder: Path, error: Exception) -> BaseModelError:
    """What to say where transformers cannot load a part of a base model.

    Args:
        part: of it, in a word.
        label: the model in error messages.
        folder: where it lies.
        error: what transformers raised.
    """
    return BaseModelError(
        f"the {part} of the base model {label} must load from {folder}",
        found=_first_line(error),
        remedy=f"{AGAIN}; a family newer than the installed transformers needs a newer one",
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
