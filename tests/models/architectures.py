"""Tiny random models of the architectures people distil, each with what makes it special.

Made of transformers' own configuration classes, float32, saved as a user's would be. Weights are
drawn wider than models start with, so that a norm, a window or a scale left out shows in the
logits far above rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.models.common_settings import (
    EXPERTS,
    GROUPED,
    HEAD,
    QWEN2_MOE_PACK,
    WINDOWS,
    Architecture,
)
from tests.models.hybrids import HYBRIDS

VOCAB = 97

ARCHITECTURES = {
    a.model_type: a
    for a in [
        Architecture("llama", "tied", {**GROUPED, "tie_word_embeddings": True}),
        Architecture("mistral", "sliding window", {**GROUPED, **HEAD, "sliding_window": 4}),
        Architecture("qwen2", "biases of q, k, v", GROUPED),
        Architecture("qwen3", "norms of q and k", {**GROUPED, **HEAD}),
        Architecture(
            "gemma2",
            "both soft-caps, windows, tied",
            {
                **GROUPED,
                **HEAD,
                **WINDOWS,
                "final_logit_softcapping": 2.0,
                "attn_logit_softcapping": 5.0,
                "query_pre_attn_scalar": 8,
            },
            attention="eager",
        ),
        Architecture(
            "gemma3_text",
            "norms of q and k, two rotary bases, windows, tied",
            {**GROUPED, **HEAD, **WINDOWS, "query_pre_attn_scalar": 8},
        ),
        Architecture(
            "phi", "bias on the head, partial rotary, parallel attention and mlp", GROUPED
        ),
        Architecture("phi3", "fused qkv and gate_up", {**GROUPED, "pad_token_id": 0}),
        Architecture(
            "gpt2",
            "learned positions, Conv1D, tied",
            {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        ),
        Architecture(
            "gpt_neox",
            "fused qkv by head, untied embed_out",
            {k: v for k, v in GROUPED.items() if k != "num_key_value_heads"},
        ),
        Architecture(
            "granite",
            "logits divided, residual and attention multipliers",
            {
                **GROUPED,
                "logits_scaling": 4.0,
                "residual_multiplier": 0.5,
                "embedding_multiplier": 3.0,
                "attention_multiplier": 0.2,
            },
        ),
        Architecture(
            "cohere",
            "logit scale, norms of q and k, parallel, tied",
            {**GROUPED, "logit_scale": 0.25, "use_qk_norm": True},
        ),
        Architecture(
            "olmo2", "norms after the sublayers, norms over all heads of q and k", GROUPED
        ),
        Architecture(
            "mixtral", "experts", {**GROUPED, **EXPERTS, "num_local_experts": 4}, experts=True
        ),
        Architecture(
            "qwen2_moe",
            "experts, a shared expert with a gate",
            {
                **GROUPED,
                **EXPERTS,
                "num_experts": 4,
                "moe_intermediate_size": 16,
                "shared_expert_intermediate_size": 32,
            },
            experts=True,
            pack=QWEN2_MOE_PACK,
        ),
        Architecture(
            "qwen3_moe",
            "experts, norms of q and k",
            {**GROUPED, **HEAD, **EXPERTS, "num_experts": 4, "moe_intermediate_size": 16},
            experts=True,
        ),
        Architecture(
            "gpt_oss",
            "experts with biases, attention sinks, windows",
            {
                **GROUPED,
                **HEAD,
                **EXPERTS,
                **WINDOWS,
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
                **GROUPED,
                **EXPERTS,
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
