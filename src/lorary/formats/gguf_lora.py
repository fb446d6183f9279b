"""An adapter as a GGUF file, which llama.cpp adds to its own copy of the base model (`llama-server --lora FILE`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorary.adapter import Adapter, check_low_rank
from lorary.errors import AdapterError

# Families by the name that llama.cpp has for them, and whether its files hold the rows of q_proj and k_proj in the
# order of interleaved rotary positions.
_FAMILIES = {"llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False)}
# The suffix under which each rotary projection gives its number of heads.
_HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


def write_gguf_lora(path: Path, adapter: Adapter, configuration: Mapping[str, Any]) -> None:
    """Write an adapter for llama.cpp.

    llama.cpp scales every layer by one alpha over the layer's rank. Scalings that differ from that are folded into
    lora_b, so that the update is the same in every layer. Factors are float32.

    Args:
        path: of the file, which must not exist.
        adapter: the adapter.
        configuration: of the base: `model_type`, `num_hidden_layers`, and numbers of heads.

    Raises:
        AdapterError: if the family of the base has no mapping here, llama.cpp has no tensor for a layer, or the
            adapter has a bias or a magnitude (DoRA), which the format does not hold.
    """
    tensors = lora_tensors(adapter, configuration)
    from gguf import GGUFWriter  # imported here: only an export needs it

    writer = GGUFWriter(str(path), _FAMILIES[str(configuration["model_type"])][0])
    writer.add_type("adapter")
    writer.add_name(adapter.name)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(adapter.rank))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def lora_tensors(adapter: Adapter, configuration: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the file by name, for an alpha that is the adapter's largest rank.

    Raises:
        AdapterError: as for `write_gguf_lora`.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    check_low_rank(
        adapter.name, adapter.modules, "be written as a GGUF LoRA, which holds two factors a layer",
        remedy="export it for transformers, merged into the base, and convert that",
    )  # fmt: skip
    family = configuration.get("model_type")
    if family not in _FAMILIES:
        raise AdapterError(
            f"adapter '{adapter.name}' must be over a base of a family that is mapped to llama.cpp: "
            f"{', '.join(_FAMILIES)}",
            found=family,
            remedy="export it for peft, and convert it with llama.cpp's convert_lora_to_gguf.py",
        )
    architecture, is_interleaved = _FAMILIES[str(family)]
    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(MODEL_ARCH(number), int(configuration["num_hidden_layers"]))
    tensors = {}
    for path, factors in adapter:
        name = names.get_name(f"{path}.weight", try_suffixes=(".weight",))
        if name is None:
            raise AdapterError(
                f"adapter '{adapter.name}' must adapt layers that llama.cpp has a tensor for", found=path
            )
        # llama.cpp multiplies by alpha / rank of the layer.
        lora_b = factors.lora_b.double() * (factors.scaling * factors.rank / adapter.rank)
        kind = path.rpartition(".")[2]
        if is_interleaved and kind in _HEADS:
            lora_b = interleaved(lora_b, int(configuration.get(_HEADS[kind]) or configuration["num_attention_heads"]))
        tensors[f"{name}.lora_a"] = factors.lora_a.float().contiguous()
        tensors[f"{name}.lora_b"] = lora_b.float().contiguous()
    return tensors


def interleaved(rows: Tensor, num_heads: int) -> Tensor:
    """The rows of each head with the halves of its rotary pairs side by side, (d_out, rank)."""
    halves = rows.view(num_heads, 2, -1, rows.shape[1])
    return torch.stack([halves[:, 0], halves[:, 1]], dim=2).reshape(rows.shape)
