"""Tiny random multimodal models: of transformers' own classes, float32, as users save them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from tests.models.architectures import VOCAB

_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 0,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "depth": 1,
    "embed_dim": 32,
    "num_heads": 4,
    "out_hidden_size": 32,
    "projection_dim": 32,
}
_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MROPE = {
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
}


def _of(text: str, **settings: Any) -> dict[str, Any]:
    return {"model_type": text, **settings}


_CLIP, _SIGLIP = _of("clip_vision_model"), _of("siglip_vision_model")

# Settings of the text model, and of the part that sees, by model_type and what is special.
MULTIMODAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "aria": (
        {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
        _of("idefics3_vision"),
    ),
    "deepseek_vl": (_of("llama"), _SIGLIP),
    "exaone4_5": (_of("exaone4"), {}),
    "gemma3": ({**_WINDOWS, "query_pre_attn_scalar": 8}, {}),
    "gemma4": (
        {
            **_WINDOWS,
            "global_head_dim": 8,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
        },
        {"head_dim": 8, "global_head_dim": 8},
    ),
    "got_ocr2": (_of("qwen2"), {"output_channels": 16, "global_attn_indexes": [0]}),
    "hyperclovax_vision_v2": (_of("hyperclovax"), {}),
    "idefics2": (_of("mistral"), {}),
    "idefics3": (_of("llama"), {}),
    "internvl": (_of("qwen2"), {"image_size": [28, 28], "patch_size": [14, 14]}),
    "lfm2_vl": (
        _of("lfm2", layer_types=["conv", "full_attention"], block_ff_dim=48),
        _of("siglip2_vision_model"),
    ),
    "lighton_ocr": (_of("qwen3"), {}),
    "llama4": (
        {
            "num_local_experts": 4,
            "intermediate_size_mlp": 48,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
        },
        {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    ),
    "llava": (_of("llama"), _CLIP),
    "llava mistral": (_of("mistral", sliding_window=4), _CLIP),
    "llava_next": (_of("llama"), _CLIP),
    "llava_next_video": (_of("llama"), _CLIP),
    "llava_onevision": (_of("qwen2"), _SIGLIP),
    "minicpmv4_6": (_of("qwen3_5_text", **_LINEAR), {}),
    "mistral3": (_of("mistral"), {}),
    "ovis2": (_of("qwen2"), {}),
    "qwen2_5_vl": (_MROPE, {"fullatt_block_indexes": [0]}),
    "qwen2_vl": (_MROPE, {}),
    "qwen3_5": (_LINEAR, {}),
    "qwen3_5_moe": ({**_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 16}, {}),
    "qwen3_vl": (_MROPE, {"deepstack_visual_indexes": [0]}),
    "qwen3_vl_moe": ({**_MROPE, **_EXPERTS}, {"deepstack_visual_indexes": [0]}),
    "smolvlm": (_of("llama"), {}),
    "video_llama_3": (_of("qwen2"), {}),
    "video_llava": (_of("llama"), _CLIP),
    "vipllava": (_of("llama"), {**_CLIP, "num_hidden_layers": 2}),
}
# Linear attention and convolutions carry a state from one document into the next.
PACK = {name: "concat" for name in ("lfm2_vl", "minicpmv4_6", "qwen3_5", "qwen3_5_moe")}


def save_multimodal(path: Path | str, name: str, *, seed: int = 0, **more: Any) -> str:
    """A random model of MULTIMODAL as safetensors in `path`, which is returned.

    more: settings of the whole model.
    """
    import torch
    from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    text, vision = MULTIMODAL[name]
    settings = {
        "text_config": _TEXT | text,
        "vision_config": _VISION | vision,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "image_token_id": 96,
        "image_token_index": 96,
        "video_token_id": 95,
        "vision_start_token_id": 94,
        "vision_end_token_id": 93,
        **more,
    }
    config = CONFIG_MAPPING[name.split()[0]](**copy.deepcopy(settings))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)](config)
        for parameter in model.parameters():
            # Biases and norms start at 0 and 1, where leaving them out would not show.
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(path)
    return str(path)


def whole_model(path: Path | str) -> Any:
    """The whole multimodal model, as plain transformers loads it."""
    import torch
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
