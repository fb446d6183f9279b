"""GGUF files of several families against the very models that they were written from: the same logits.

The files are written here as llama.cpp's converters write them: its names, its order of the rotated entries of a
Llama's heads, norms with 1 added where a family's code adds it.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lorary.formats.gguf import dequantise
from lorary.formats.pretrained import load_pretrained
from lorary.formats.quiet import quiet_transformers

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": None,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
SIZES = {
    "context_length": 64, "embedding_length": 32, "block_count": 2, "feed_forward_length": 48,
    "attention.head_count": 4, "attention.head_count_kv": 2,
}  # fmt: skip
RMS = {"attention.layer_norm_rms_epsilon": 1e-5}
NORM = {"attention.layer_norm_epsilon": 1e-5}
BASE = {"rope.freq_base": 10000.0}
HEADS = {"attention.key_length": 8, "attention.value_length": 8}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
HALF = {**PLAIN, "partial_rotary_factor": 0.5}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}
YARN_KEYS = {
    "rope.freq_base": 1e6, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 16,
}  # fmt: skip
GEMMA = {"rms_norm_eps": 1e-5, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}
MIXED = {
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "sliding_attention": PLAIN,
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    },
}
MIXED_KEYS = {
    "rope.freq_base": 1e6, "rope.freq_base_swa": 10000.0, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0,
    "attention.sliding_window": 6, "attention.sliding_window_pattern": [True, False],
}  # fmt: skip
EXPERTS = {"rms_norm_eps": 1e-5, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
EXPERT_KEYS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 24}
CAPS = {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}

# Family in GGUF's word, configuration class, its fields, and the keys that say the same in the file.
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "Llama": ("llama", "LlamaConfig", {"rms_norm_eps": 1e-5}, {**RMS, "rope.dimension_count": 8}),
    "Llama with wide heads": (
        "llama", "LlamaConfig", {"rms_norm_eps": 1e-5, "head_dim": 16},
        {**RMS, "rope.dimension_count": 16, "attention.key_length": 16, "attention.value_length": 16},
    ),
    "Qwen2 with YaRN": ("qwen2", "Qwen2Config", {"rms_norm_eps": 1e-5, "rope_parameters": YARN}, {**RMS, **YARN_KEYS}),
    "Qwen3": ("qwen3", "Qwen3Config", {"rms_norm_eps": 1e-5, "head_dim": 8}, {**RMS, **BASE, **HEADS}),
    "Phi-3 with a window": (
        "phi3", "Phi3Config", {"rms_norm_eps": 1e-5, "sliding_window": 7},
        {**RMS, **BASE, "rope.dimension_count": 8, "attention.sliding_window": 7},
    ),
    "Phi-3 rotated in part": (
        "phi3", "Phi3Config", {"rms_norm_eps": 1e-5, "rope_parameters": HALF},
        {**RMS, **BASE, "rope.dimension_count": 4},
    ),
    "Starcoder2": (
        "starcoder2", "Starcoder2Config", {"norm_epsilon": 1e-5, "rope_parameters": {**PLAIN, "rope_theta": 100.0}},
        {**NORM, "rope.freq_base": 100.0},
    ),
    "StableLM": (
        "stablelm", "StableLmConfig", {"layer_norm_eps": 1e-5, "rope_parameters": HALF},
        {**NORM, **BASE, "rope.dimension_count": 4, "use_parallel_residual": False},
    ),
    "Gemma 2": (
        "gemma2", "Gemma2Config", {**GEMMA, **CAPS}, {**RMS, **BASE, **HEADS, **CAPS, "attention.sliding_window": 6},
    ),
    "Gemma 3 with scaled positions": ("gemma3", "Gemma3TextConfig", {**GEMMA, **MIXED}, {**RMS, **HEADS, **MIXED_KEYS}),
    "Nemotron": (
        "nemotron", "NemotronConfig", {"norm_eps": 1e-5, "rope_parameters": HALF},
        {**NORM, **BASE, "rope.dimension_count": 4},
    ),
    "Qwen2-MoE": (
        "qwen2moe", "Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 40},
        {**RMS, **BASE, **EXPERT_KEYS, "expert_shared_feed_forward_length": 40},
    ),
    "Qwen3-MoE": (
        "qwen3moe", "Qwen3MoeConfig", {**EXPERTS, "head_dim": 8, "norm_topk_prob": True},
        {**RMS, **BASE, **HEADS, **EXPERT_KEYS},
    ),
    "GPT-2": ("gpt2", "GPT2Config", {"n_inner": 48}, {**NORM, "attention.head_count_kv": None}),
    "Mamba": (
        "mamba", "MambaConfig",
        {"state_size": 4, "time_step_rank": 2, "conv_kernel": 4, "intermediate_size": 64, "layer_norm_epsilon": 1e-5},
        {**RMS, "ssm.conv_kernel": 4, "ssm.state_size": 4, "ssm.time_step_rank": 2, "ssm.inner_size": 64,
         "ssm.dt_b_c_rms": False, "feed_forward_length": 0, "attention.head_count": 0, "attention.head_count_kv": None},
    ),
}  # fmt: skip


def write(path: Path, family: str, model: Any, keys: dict[str, Any], words: list[str]) -> None:
    """Write a model as a GGUF file."""
    from gguf import MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map

    writer = GGUFWriter(str(path), family)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([3] + [1] * (len(words) - 1))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    adders = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array,
        str: writer.add_string,
    }  # fmt: skip
    for key, value in {**SIZES, **keys}.items():
        if value is not None:
            adders[type(value)](f"{family}.{key}", value)
    names = get_tensor_name_map(next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == family), 2)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        values = tensor.float()
        if family in ("gemma2", "gemma3", "nemotron") and name.endswith("norm.weight"):
            values = values + 1
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            num_heads = 4 if "q_proj" in name else 2
            values = values.view(num_heads, 2, -1, values.shape[1]).transpose(1, 2).reshape(values.shape)
        for place, part in placed(names, family, name, values).items():
            writer.add_tensor(place, part.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def placed(names: Any, family: str, name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight of a model as the tensors that a converter makes of it, by their names in the file."""
    stem, _, last = name.rpartition(".")
    if last == "gate_up_proj":
        gate, up = values.chunk(2, dim=1)
        block = f"blk.{name.split('.')[2]}"
        return {f"{block}.ffn_gate_exps.weight": gate, f"{block}.ffn_up_exps.weight": up}
    if last == "down_proj":
        return {f"{names.get_name(name)}.weight": values}
    if last in ("A_log", "D"):
        return {names.get_name(name): -values.exp() if last == "A_log" else values}
    if family == "gpt2" and values.ndim == 2 and (".attn." in name or ".mlp." in name):
        values = values.T
    if name.endswith(("conv1d.weight", "shared_expert_gate.weight")):
        values = values.squeeze()
    return {f"{names.get_name(stem)}.{last}": values}


@pytest.mark.parametrize("case", CASES)
def test_a_converted_file_has_the_logits_of_the_model_that_it_was_written_from(
    case: str, tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    monkeypatch.setenv("LORARY_CACHE", str(tmp_path / "cache"))
    family, config, fields, keys = CASES[case]
    words = ["<|end|>", *sorted(ByteLevel.alphabet()), "ab"]
    settings = getattr(transformers, config)(**{**SHAPE, "vocab_size": len(words), **fields})
    with quiet_transformers(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(settings).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    write(tmp_path / "tiny.gguf", family, model, keys, words)
    folder, _ = dequantise(tmp_path / "tiny.gguf")
    converted, _ = load_pretrained(folder, case, torch.float32)
    ids = torch.arange(1, 61)[None]
    with torch.no_grad():
        expected, found = model(ids).logits, converted(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.std()))
