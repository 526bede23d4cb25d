"""Mixtures of experts of transformers, beyond those in tests/models/architectures.py."""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
_NARROW = {"moe_intermediate_size": 16}
_GROUPS = {
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    **_NARROW,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}

MIXTURES: dict[str, dict[str, Any]] = {
    "olmoe": {**_COMMON, "num_experts": 4},
    "flex_olmo": {**_COMMON, "num_experts": 4},
    "glm4_moe": {**_COMMON, **_GROUPS},
    "granitemoe": {**_COMMON, "num_local_experts": 4},
    "granitemoeshared": {**_COMMON, "num_local_experts": 4, "shared_intermediate_size": 32},
    "llama4_text": {
        **_COMMON,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 48,
        "attention_chunk_size": 8192,
    },
    "phimoe": {**_COMMON, "num_local_experts": 4},
    "dots1": {**_COMMON, **_GROUPS},
    "ernie4_5_moe": {
        **_COMMON,
        **_NARROW,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
    },
    "hunyuan_v1_moe": {**_COMMON, "num_experts": 4, "moe_topk": 2, "num_shared_expert": 1},
    "deepseek_v2": {**_COMMON, **_GROUPS, **_LATENT},
    "longcat_flash": {
        **_COMMON,
        **_LATENT,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "expert_ffn_hidden_size": 16,
        "ffn_hidden_size": 48,
        "num_layers": 2,
    },
    "jetmoe": {**_COMMON, "num_local_experts": 4, "kv_channels": 8},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {
            "ffn_hidden_size": 48,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "hidden_size": 32,
        },
    },
    "minimax_m2": {**_COMMON, "num_local_experts": 4},
    "solar_open": {**_COMMON, **_GROUPS},
    "hy_v3": {**_COMMON, **_NARROW, "num_experts": 4, "num_shared_experts": 1},
    "afmoe": {
        **_COMMON,
        **_NARROW,
        "num_experts": 4,
        "num_shared_experts": 1,
        "num_dense_layers": 1,
        "sliding_window": 16,
    },
    "qwen3_5_moe_text": {
        **_COMMON,
        **_NARROW,
        "num_experts": 4,
        "shared_expert_intermediate_size": 32,
        "layer_types": ["full_attention", "full_attention"],
    },
    "qwen3_next": {
        **_COMMON,
        **_NARROW,
        "num_experts": 4,
        "shared_expert_intermediate_size": 32,
        "layer_types": ["full_attention", "full_attention"],
    },
}
