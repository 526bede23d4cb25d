"""Tiny random models of the architectures people distil, each with what makes it special.

Made of transformers' own configuration classes, float32, saved as a user's would be. Weights are
drawn wider than models start with, so that a norm, a window or a scale left out shows in the
logits far above rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

VOCAB = 97


@dataclass(frozen=True)
class Architecture:
    """model_type and settings of a tiny model, and how it has to be run."""

    model_type: str
    special: str
    settings: dict[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"  # gpt-oss has its sinks in the eager one only
    experts: bool = False
    pack: str = "isolate"


_GROUPED = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_HEAD = {"head_dim": 8}
_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
# transformers 4 gives Qwen2-MoE, and 4 and 5 give gpt-oss, no mask that keeps documents apart.
_QWEN2_MOE_PACK = "concat" if version("transformers").startswith("4.") else "isolate"
_EXPERTS = {"num_experts_per_tok": 2}

ARCHITECTURES = {
    a.model_type: a
    for a in [
        Architecture("llama", "tied", {**_GROUPED, "tie_word_embeddings": True}),
        Architecture("mistral", "sliding window", {**_GROUPED, **_HEAD, "sliding_window": 4}),
        Architecture("qwen2", "biases of q, k, v", _GROUPED),
        Architecture("qwen3", "norms of q and k", {**_GROUPED, **_HEAD}),
        Architecture(
            "gemma2",
            "both soft-caps, windows, tied",
            {
                **_GROUPED,
                **_HEAD,
                **_WINDOWS,
                "final_logit_softcapping": 2.0,
                "attn_logit_softcapping": 5.0,
                "query_pre_attn_scalar": 8,
            },
            attention="eager",
        ),
        Architecture(
            "gemma3_text",
            "norms of q and k, two rotary bases, windows, tied",
            {**_GROUPED, **_HEAD, **_WINDOWS, "query_pre_attn_scalar": 8},
        ),
        Architecture(
            "phi", "bias on the head, partial rotary, parallel attention and mlp", _GROUPED
        ),
        Architecture("phi3", "fused qkv and gate_up", {**_GROUPED, "pad_token_id": 0}),
        Architecture(
            "gpt2",
            "learned positions, Conv1D, tied",
            {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        ),
        Architecture(
            "gpt_neox",
            "fused qkv by head, untied embed_out",
            {k: v for k, v in _GROUPED.items() if k != "num_key_value_heads"},
        ),
        Architecture(
            "granite",
            "logits divided, residual and attention multipliers",
            {
                **_GROUPED,
                "logits_scaling": 4.0,
                "residual_multiplier": 0.5,
                "embedding_multiplier": 3.0,
                "attention_multiplier": 0.2,
            },
        ),
        Architecture(
            "cohere",
            "logit scale, norms of q and k, parallel, tied",
            {**_GROUPED, "logit_scale": 0.25, "use_qk_norm": True},
        ),
        Architecture(
            "olmo2", "norms after the sublayers, norms over all heads of q and k", _GROUPED
        ),
        Architecture(
            "mixtral", "experts", {**_GROUPED, **_EXPERTS, "num_local_experts": 4}, experts=True
        ),
        Architecture(
            "qwen2_moe",
            "experts, a shared expert with a gate",
            {
                **_GROUPED,
                **_EXPERTS,
                "num_experts": 4,
                "moe_intermediate_size": 16,
                "shared_expert_intermediate_size": 32,
            },
            experts=True,
            pack=_QWEN2_MOE_PACK,
        ),
        Architecture(
            "qwen3_moe",
            "experts, norms of q and k",
            {**_GROUPED, **_HEAD, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 16},
            experts=True,
        ),
        Architecture(
            "gpt_oss",
            "experts with biases, attention sinks, windows",
            {
                **_GROUPED,
                **_HEAD,
                **_EXPERTS,
                **_WINDOWS,
                "num_local_experts": 4,
                "max_position_embeddings": 131072,  # what its rotary scaling is made for
            },
            attention="eager",
            experts=True,
            pack="concat",
        ),
        Architecture(
            "deepseek_v3",
            "latent attention, grouped experts, a dense first layer",
            {
                **_GROUPED,
                **_EXPERTS,
                "num_key_value_heads": 4,
                "n_routed_experts": 4,
                "n_group": 2,
                "topk_group": 1,
                "moe_intermediate_size": 16,
                "n_shared_experts": 1,
                "first_k_dense_replace": 1,
                "q_lora_rank": 16,
                "kv_lora_rank": 16,
                "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 8,
                "v_head_dim": 8,
            },
            experts=True,
        ),
    ]
}

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
    **_EXPERTS,
    "num_experts": 4,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}

_DELTA_AND_LATENT = {
    **_GROUPED,
    **_EXPERTS,
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
            {**_GROUPED, **_HEAD, **_DELTA, **_FEW_EXPERTS},
            experts=True,
        ),
        Architecture(
            "qwen3_5_text", "gated delta rule, gated attention", {**_GROUPED, **_HEAD, **_DELTA}
        ),
        Architecture(
            "qwen3_5_moe_text",
            "gated delta rule, experts",
            {**_GROUPED, **_HEAD, **_DELTA, **_FEW_EXPERTS},
            experts=True,
        ),
        Architecture(
            "falcon_h1",
            "Mamba-2 beside attention in each layer, multipliers",
            {
                **_GROUPED,
                **_HEAD,
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
                **_GROUPED,
                **_HEAD,
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
                **_GROUPED,
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
            {**_GROUPED, "layer_types": ["conv", "full_attention"], "block_multiple_of": 16},
        ),
        Architecture(
            "lfm2_moe",
            "short convolutions, experts",
            {
                **_GROUPED,
                **_EXPERTS,
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
                **_GROUPED,
                **_EXPERTS,
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
        Architecture("bamba", "Mamba-2", {**_GROUPED, **_MAMBA2, "attn_layer_indices": [1]}),
        Architecture(
            "zamba2",
            "Mamba-2, one attention shared by layers",
            {
                **_GROUPED,
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
                **_GROUPED,
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
                **_GROUPED,
                **_HEAD,
                **_EXPERTS,
                "num_local_experts": 4,
                "block_size": 8,
                "layer_types": ["linear_attention", "full_attention"],
            },
            experts=True,
        ),
        Architecture(
            "olmo_hybrid",
            "gated delta rule, norms after the sublayers",
            {**_GROUPED, **_DELTA, "pad_token_id": 0},
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
            {**_GROUPED, "layer_types": ["conv", "full_attention"], "pad_token_id": 0},
        ),
        Architecture(
            "zaya",
            "convolved attention, delayed values, experts",
            {
                **_GROUPED,
                **_HEAD,
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
                **_GROUPED,
                **_HEAD,
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


def save_architecture(path: Path | str, model_type: str, *, seed: int = 0, **more: Any) -> str:
    """A random model of `model_type`, float32, as safetensors in `path`, which is returned."""
    settings = (ARCHITECTURES | HYBRIDS)[model_type].settings | more
    if model_type in HYBRIDS:
        # At 0.2 plain transformers in float32 is up to 3e-5 from itself in float64.
        settings = {"initializer_range": 0.1} | settings
    return save_random(path, model_type, settings, seed=seed)


def save_random(path: Path | str, model_type: str, settings: dict[str, Any], *, seed: int) -> str:
    """The same with these settings."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": 0}
    config = AutoConfig.for_model(model_type, **common | {"initializer_range": 0.2} | settings)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            # Biases and norms start at 0 and 1, where leaving them out would not show.
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(path)
    return str(path)
