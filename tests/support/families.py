"""Tiny random models of many families of causal language models that transformers has code for."""

from typing import Any

import torch
import transformers

# Sizes by the names that configurations give them.
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "d_model": 32, "n_embd": 32, "embed_dim": 32, "emb_dim": 32, "dim": 32,
    "word_embed_proj_dim": 32, "embedding_size": 32, "decoder_embed_dim": 32, "attention_hidden_size": 32,
    "intermediate_size": 48, "ffn_dim": 48, "d_ff": 48, "dff": 48, "n_inner": 48, "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48, "ffn_hidden_size": 48, "feed_forward_size": 48, "dim_ff": 48, "d_inner": 48,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 2,
    "num_decoder_layers": 2, "num_encoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "num_encoder_attention_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8, "attention_head_size": 8, "rotary_dim": 4, "d_kv": 8,
    "max_position_embeddings": 64, "n_positions": 64, "max_seq_len": 64, "n_ctx": 64, "max_target_positions": 64,
    "context_length": 64, "dim_head": 8, "encoder_ffn_dim_": 48, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "moe_topk": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1, "sliding_window": 4, "window_size": 4,
    "state_size": 4, "time_step_rank": 4, "conv_kernel": 4, "n_shared_experts": 1, "initializer_range": 0.2,
    "init_std": 0.2, "mamba_d_state": 4, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1,
    "mamba_dt_rank": 4, "mamba_d_conv": 4, "mamba_expand": 2, "n_mamba_heads": 2, "ssm_state_size": 4,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
# What else a family needs to be tiny, or to be a decoder.
FIELDS: dict[str, dict[str, Any]] = {
    **{
        name: {"is_decoder": True}
        for name in (
            "bert", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert", "roberta",
            "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod", "bert-generation",
        )
    },
    "xlnet": {"d_head": 8},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 4, "n_groups": 1, "chunk_size": 4},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 4, "num_hidden_layers": 3},
    "zamba2": {"mamba_headdim": 16, "mamba_d_state": 4, "mamba_ngroups": 1, "n_mamba_heads": 4},
    "deepseek_v2": {"num_key_value_heads": 4}, "deepseek_v3": {"num_key_value_heads": 4},
    "deepseek_v32": {"num_key_value_heads": 4, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 64},
    "minicpm3": {"num_key_value_heads": 4}, "longcat_flash": {"num_key_value_heads": 4},
    "youtu": {"num_key_value_heads": 4}, "glm4_moe_lite": {"num_key_value_heads": 4},
    "axk1": {"num_key_value_heads": 4}, "axk2": {"num_key_value_heads": 4},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    "big_bird": {"is_decoder": True, "attention_type": "original_full"},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    **{
        name: {"layer_types": ["linear_attention", "full_attention"]}
        for name in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
    },
    "xlm": {"causal": True, "is_encoder": False, "asm": False},
}  # fmt: skip

# Those that are tried: what fits the sizes above, in a fraction of a second.
FAMILIES = (
    "afmoe", "apertus", "arcee", "aria_text", "axk1", "axk2", "bamba", "bart", "beam", "bert", "bert-generation",
    "big_bird", "bigbird_pegasus", "biogpt", "bitnet", "blenderbot", "blenderbot-small", "bloom", "camembert",
    "codegen", "cohere", "cohere2", "cohere2_moe", "cpmant", "ctrl", "cwm", "data2vec-text", "deepseek_v2",
    "deepseek_v3", "deepseek_v32", "diffllama", "doge", "dots1", "electra", "ernie", "ernie4_5", "ernie4_5_moe",
    "exaone4", "exaone_moe", "falcon", "falcon_mamba", "flex_olmo", "flint", "gemma", "gemma2", "gemma3_text",
    "gemma4_unified_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo",
    "gpt_neox", "gpt_neox_japanese", "gpt_oss", "gptj", "granite", "granite_swa", "granitemoe", "granitemoe_swa",
    "granitemoehybrid", "granitemoeshared", "helium", "hrm_text", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3",
    "hy_v4", "hyperclovax", "internlm3", "iquestcoder", "jais2", "jamba", "jetmoe", "kolibri1", "laguna", "lfm2",
    "llama", "llama4_text", "mamba", "mamba2", "marian", "mbart", "megatron-bert", "mellum", "mimo_v2_flash",
    "minicpm3", "minimax", "minimax_m2", "ministral", "ministral3", "mistral", "mixtral", "modernbert-decoder",
    "moshi", "mpt", "mvp", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "openai-gpt",
    "opt", "pegasus", "persimmon", "phi", "phi3", "phimoe", "plbart", "prophetnet", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next", "recurrent_gemma", "reformer", "rembert",
    "roberta", "roberta-prelayernorm", "roformer", "rwkv", "seed_oss", "smollm3", "solar_open", "stablelm",
    "starcoder2", "trocr", "vaultgemma", "whisper", "xglm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod",
    "youtu",
)  # fmt: skip


def tiny_family(family: str, *, dtype: torch.dtype = torch.float64, **fields: Any) -> Any:
    """A tiny random model of a family, in evaluation mode.

    Args:
        family: its `model_type`.
        dtype: of its weights.
        fields: of the configuration, beside or in place of those of this file.
    """
    kind = transformers.CONFIG_MAPPING[family]
    names = set(kind().to_dict()) - set(kind.attribute_map)
    # Latent attention has head sizes of its own.
    names -= {"head_dim"} if "kv_lora_rank" in names else set()
    sizes = {name: value for name, value in SIZES.items() if name in names}
    config = kind(**{**sizes, **FIELDS.get(family, {}), **fields})
    # The quick kernel of mixtures takes no float64.
    config._experts_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # a gate that is zero at first would hide what is behind it
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).eval().requires_grad_(False)
