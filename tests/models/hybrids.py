"""Tiny models that carry a state from token to token, see architectures.py."""

from __future__ import annotations

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from tests.models.common_settings import EXPERTS, GROUPED, HEAD, Architecture

_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_FEW_EXPERTS = {
    **EXPERTS,
    "num_experts": 4,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}

_DELTA_AND_LATENT = {
    **GROUPED,
    **EXPERTS,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse"],
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
}

# Models that carry a state from token to token.
HYBRIDS = {
    a.model_type: a
    for a in [
        Architecture(
            "qwen3_next",
            "gated delta rule, gated attention, experts",
            {**GROUPED, **HEAD, **_DELTA, **_FEW_EXPERTS},
            experts=True,
        ),
        Architecture(
            "qwen3_5_text", "gated delta rule, gated attention", {**GROUPED, **HEAD, **_DELTA}
        ),
        Architecture(
            "qwen3_5_moe_text",
            "gated delta rule, experts",
            {**GROUPED, **HEAD, **_DELTA, **_FEW_EXPERTS},
            experts=True,
        ),
        Architecture(
            "falcon_h1",
            "Mamba-2 beside attention in each layer, multipliers",
            {
                **GROUPED,
                **HEAD,
                **_MAMBA2,
                "mamba_d_ssm": 64,
                "lm_head_multiplier": 0.5,
                "ssm_multipliers": [1.0, 0.9, 1.1, 0.8, 1.2],
            },
        ),
        Architecture(
            "nemotron_h",
            "Mamba-2, attention and mlp in layers of their own",
            {
                **GROUPED,
                **HEAD,
                "num_hidden_layers": 3,
                "mamba_num_heads": 4,
                "mamba_head_dim": 16,
                "ssm_state_size": 8,
                "n_groups": 2,
                "chunk_size": 8,
                "layers_block_type": ["linear_attention", "mlp", "full_attention"],
            },
        ),
        Architecture(
            "granitemoehybrid",
            "Mamba-2, experts, multipliers, no positions",
            {
                **GROUPED,
                **_MAMBA2,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "shared_intermediate_size": 32,
                "layer_types": ["mamba", "attention"],
                "logits_scaling": 4.0,
                "residual_multiplier": 0.5,
                "embedding_multiplier": 3.0,
            },
            experts=True,
        ),
        Architecture(
            "lfm2",
            "short convolutions",
            {**GROUPED, "layer_types": ["conv", "full_attention"], "block_multiple_of": 16},
        ),
        Architecture(
            "lfm2_moe",
            "short convolutions, experts",
            {
                **GROUPED,
                **EXPERTS,
                "num_experts": 4,
                "moe_intermediate_size": 16,
                "num_dense_layers": 1,
                "layer_types": ["conv", "full_attention"],
            },
            experts=True,
        ),
        Architecture(
            "jamba",
            "Mamba, experts in every second layer",
            {
                **GROUPED,
                **EXPERTS,
                "num_experts": 4,
                "attn_layer_period": 2,
                "attn_layer_offset": 1,
                "expert_layer_period": 2,
                "expert_layer_offset": 1,
                "mamba_d_state": 8,
                "mamba_dt_rank": 4,
                "use_mamba_kernels": False,
                "pad_token_id": 0,
            },
            experts=True,
        ),
        Architecture("bamba", "Mamba-2", {**GROUPED, **_MAMBA2, "attn_layer_indices": [1]}),
        Architecture(
            "zamba2",
            "Mamba-2, one attention shared by layers",
            {
                **GROUPED,
                "num_key_value_heads": 4,
                "mamba_d_state": 8,
                "mamba_headdim": 16,
                "n_mamba_heads": 4,
                "chunk_size": 8,
                "num_hidden_layers": 3,
                "num_mem_blocks": 1,
                "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
                "hybrid_layer_ids": [1, 2],
                "use_mamba_kernels": False,
                "pad_token_id": 0,
            },
        ),
        Architecture(
            "mamba", "Mamba alone", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
        ),
        Architecture(
            "mamba2",
            "Mamba-2 alone",
            {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "state_size": 8,
                "num_heads": 4,
                "head_dim": 16,
                "n_groups": 2,
                "chunk_size": 8,
            },
        ),
        Architecture(
            "falcon_mamba",
            "Mamba with norms of its inputs",
            {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        ),
        Architecture(
            "recurrent_gemma",
            "gated linear recurrences, windows, soft-cap, tied",
            {
                **GROUPED,
                "num_key_value_heads": 1,
                "lru_width": 32,
                "attention_window_size": 8,
                "block_types": ["recurrent", "attention"],
                "logits_soft_cap": 3.0,
                "pad_token_id": 0,
            },
        ),
        Architecture(
            "minimax",
            "lightning attention, experts",
            {
                **GROUPED,
                **HEAD,
                **EXPERTS,
                "num_local_experts": 4,
                "block_size": 8,
                "layer_types": ["linear_attention", "full_attention"],
            },
            experts=True,
        ),
        Architecture(
            "olmo_hybrid",
            "gated delta rule, norms after the sublayers",
            {**GROUPED, **_DELTA, "pad_token_id": 0},
        ),
        Architecture(
            "rwkv",
            "time mixing alone",
            {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "context_length": 64,
                "attention_hidden_size": 32,
                "intermediate_size": 48,
            },
        ),
        Architecture(
            "xlstm",
            "matrix LSTM alone, soft-caps",
            {
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_heads": 4,
                "chunk_size": 8,
                "qk_dim_factor": 1.0,
                "output_logit_soft_cap": 5.0,
            },
        ),
        Architecture(
            "kimi_linear",
            "delta attention, latent attention, experts",
            {**_DELTA_AND_LATENT},
            experts=True,
        ),
        Architecture(
            "bailing_hybrid",
            "delta attention, latent attention, experts",
            {**_DELTA_AND_LATENT},
            experts=True,
        ),
        Architecture(
            "lfm3",
            "short convolutions, windows",
            {**GROUPED, "layer_types": ["conv", "full_attention"], "pad_token_id": 0},
        ),
        Architecture(
            "zaya",
            "convolved attention, delayed values, experts",
            {
                **GROUPED,
                **HEAD,
                "num_experts": 4,
                "num_experts_per_tok": 1,
                "moe_intermediate_size": 16,
                "router_hidden_size": 16,
                "pad_token_id": 0,
            },
            experts=True,
        ),
        Architecture(
            "qwen4_exp_text",
            "gated delta rule, hyper-connections, experts",
            {
                **GROUPED,
                **HEAD,
                **_DELTA,
                **_FEW_EXPERTS,
                "hc_count": 2,
                "hc_lowrank": 8,
                "indexer_n_heads": 2,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 8,
                "indexer_budget": 8,
                "indexer_compress_ratio": 4,
            },
            experts=True,
        ),
    ]
    if a.model_type in CONFIG_MAPPING_NAMES  # those of this version of transformers
}
