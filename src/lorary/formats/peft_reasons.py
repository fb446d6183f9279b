"""What a folder, a file or a tensor is instead of PEFT's: so that a refusal names it, and not its first symptom."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"


class Reason(NamedTuple):
    """What something is, and what to do about it."""

    found: str
    remedy: str


_AGAIN = "copy or download the file again"
_CONVERT = "convert it to PEFT's layout"
_UNWRAP = "save it from the bare PEFT model, without that wrapper: PEFT would ignore these weights"

# By files that lie in a folder without PEFT's two.
_BY_FILE = {
    PICKLE_FILE: Reason(
        "a pickle, which can run code and is never opened",
        "load it in PEFT where you trust it and save it with safe_serialization=True",
    ),
    "adapters.safetensors": Reason("an adapter of mlx, not of PEFT", _CONVERT),
    "pytorch_lora_weights.safetensors": Reason("a LoRA of diffusers, not of a language model in PEFT", _CONVERT),
    "pytorch_adapter.bin": Reason("an adapter of the library adapters (AdapterHub), not of PEFT", _CONVERT),
    "adapter_model.safetensors.index.json": Reason("an adapter in several files, which PEFT cannot load", _CONVERT),
    "model.safetensors": Reason("a whole model, not an adapter", "give the folder of the adapter"),
    "model.safetensors.index.json": Reason("a whole model, not an adapter", "give the folder of the adapter"),
}

# By the first bytes of a file that should be JSON or safetensors.
_BY_START = (
    (b"version https://git-lfs", Reason("a Git LFS pointer, not the file itself", "fetch it with `git lfs pull`")),
    (b"PK\x03\x04", Reason("a pickle of torch.save, not safetensors", "save it with safe_serialization=True in PEFT")),
    (b"\x80", Reason("a pickle, not safetensors", "save it with safe_serialization=True in PEFT")),
    (b"GGUF", Reason("a GGUF file", "give the adapter that it was made from")),
    (b"<", Reason("an HTML or XML page, as a server sends it for an error or a login", _AGAIN)),
)

# By what the key of a tensor begins with or holds, whatever it ends with.
_BY_WRAPPER = (
    (r"_orig_mod\.", Reason("its keys come from a model in torch.compile", _UNWRAP)),
    (r"_fsdp_wrapped_module\.|_flat_param", Reason("its keys come from a model in FSDP", _UNWRAP)),
    (r"_checkpoint_wrapped_module\.", Reason("its keys come from a model with checkpoint wrappers", _UNWRAP)),
    (r"(^|^base_model\.model\.)module\.", Reason("its keys come from a model in DataParallel or DeepSpeed", _UNWRAP)),
    (r"^base_model\.model\.base_model\.", Reason("its keys have PEFT's prefix twice", _UNWRAP)),
)

# By what stands in a key that is no factor of a linear layer, the most telling first.
_BY_KEY = (
    (r"^lora_(unet|te\d?|transformer)_|lora_(down|up)\.weight$|\.alpha$", Reason("a LoRA in kohya's layout", _CONVERT)),
    (r"\.(hada_w[12]|lokr_w[12]|lokr_t|oft_|dora_scale)", Reason("an adapter of LyCORIS, no plain LoRA", _CONVERT)),
    (r"^(unet|text_encoder|transformer)\..*lora", Reason("a LoRA of diffusers, not of a language model", _CONVERT)),
    (r"\.lora_[ab]$", Reason("an adapter in mlx's layout", _CONVERT)),
    (r"\.lora_embedding_", Reason("it adapts an embedding", "retrain without embeddings: linear layers only")),
    (
        r"\.lora_magnitude_vector",
        Reason("a magnitude under a key that PEFT does not load", "name it LAYER.lora_magnitude_vector"),
    ),
    (
        r"\.lora_[AB](\.[^.]+)?\.bias$",
        Reason("a bias under a key that PEFT does not load", "name it LAYER.lora_B.bias"),
    ),
    (r"\.experts(\.base_layer)*\.lora_", Reason("it adapts experts that are bare parameters", "retrain without them")),
    (r"\.lora_[AB](\.default)?\.weight$", Reason("its keys lack PEFT's prefix base_model.model.", _UNWRAP)),
    (
        r"\.lora_[AB]\.[^.]+\.weight$",
        Reason("its keys hold the name of the adapter in PEFT", "save it with save_pretrained, which takes it out"),
    ),
    (r"\.ia3_|\.(boft|oft|vera|hra|randlora|lora_E)", Reason("an adapter of another kind, no plain LoRA", _CONVERT)),
    (r"prompt_embeddings|prompt_encoder", Reason("a tuned prompt, no LoRA", "train a LoRA")),
)


def reason_of_folder(folder: Path) -> Reason | None:
    """What a folder holds in the place of PEFT's two files, None where nothing in it says so."""
    try:
        names = {entry.name: entry.is_dir() for entry in folder.iterdir()}
        inner = sorted(name for name, is_folder in names.items() if is_folder and _is_adapter(folder / name))
    except OSError:
        return None
    if inner:
        examples = ", ".join(inner[:3]) + (" and others" if len(inner) > 3 else "")
        return Reason(f"adapters in folders below it: {examples}", f"give one of these folders: {folder / inner[0]}")
    return reason_of_names(names)


def reason_of_names(names: Collection[str]) -> Reason | None:
    """What a folder holds in the place of PEFT's two files, by the names of its files; None where none says so."""
    # The shards of an adapter are counted in their names.
    shards = any(re.fullmatch(r"adapter_model-\d+-of-\d+\.safetensors", name) for name in names)
    if shards:
        return _BY_FILE["adapter_model.safetensors.index.json"]
    by_file = next((reason for file, reason in _BY_FILE.items() if file in names), None)
    if by_file is None and (checkpoints := sorted(name for name in names if name.endswith(".ckpt"))):
        return Reason(
            f"checkpoints as mttl and Lightning write them, the first {checkpoints[0][:80]}: they can run code and are "
            "never opened",
            "load each in mttl where you trust it, and save its LoRA with PEFT's save_pretrained",
        )
    return by_file


def _is_adapter(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("adapter_config.json", "adapter_model.safetensors"))


def reason_of_bytes(data: bytes) -> Reason | None:
    """What a file is that should be JSON or safetensors, None where its first bytes do not say so."""
    start = data[:200].lstrip()
    if not data:
        return Reason("an empty file", _AGAIN)
    return next((reason for sign, reason in _BY_START if start.startswith(sign)), None)


def reason_of_weights(data: bytes) -> Reason | None:
    """What a file is that should be safetensors, by its first thousand bytes or all of them."""
    reason = reason_of_bytes(data)
    if reason is not None:
        return reason
    if len(data) < 100_000 and all(9 <= byte < 127 or byte == 10 for byte in data[:200]):
        return Reason(f"text, beginning with {data[:60].decode('ascii', 'replace')!r}", _AGAIN)
    return None


def reason_of_config(config: Mapping[str, Any]) -> Reason | None:
    """What an adapter_config.json describes that is none of PEFT's."""
    if "peft_type" in config:
        return None
    if "lora_parameters" in config or "fine_tune_type" in config:
        return Reason("a configuration of mlx, not of PEFT", _CONVERT)
    if isinstance(config.get("config"), Mapping) or "model_class" in config:
        return Reason("a configuration of the library adapters (AdapterHub), not of PEFT", _CONVERT)
    if "architectures" in config or "model_type" in config:
        return Reason("the configuration of a whole model, not of an adapter", "give the folder of the adapter")
    return None


def reason_of_wrapper(key: str) -> Reason | None:
    """Which wrapper of a model the key of a tensor comes from, None where it comes from none."""
    return next((reason for pattern, reason in _BY_WRAPPER if re.search(pattern, key[:1000])), None)


def reason_of_key(key: str, keys: Sequence[str]) -> Reason | None:
    """What the key of a tensor says about an adapter, None where it is none of the layouts met in the wild.

    Args:
        key: that PEFT's LoRA does not have.
        keys: all keys of the file.
    """
    for pattern, reason in _BY_KEY:
        if re.search(pattern, key[:1000]):
            return reason
    if not any("lora" in candidate.lower() for candidate in keys):
        return Reason("weights of a whole model or of layers, and no LoRA factors", "give the folder of the adapter")
    return None
