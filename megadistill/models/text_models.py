"""The text model of a multimodal checkpoint, as a causal language model of its own.

Such a checkpoint's config.json keeps the text model's settings in `text_config`, and its tensors
have names such as model.language_model.layers.0. The text model alone is loaded, trained and
exported: `text_settings` gives its settings, `TENSOR_NAMES` its tensors' names. Of models with
images and sounds only those are taken whose text model gave the same logits as the whole model on
text (tests/models/test_text_models.py); others are refused, because a wrapper may scale or mask
logits, or attend in both directions (PaliGemma does), without a trace in the text model's settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megadistill.errors import ConfigError

# model_type of the whole model. The text model is the causal class of its text_config.
TEXT_MODELS = frozenset(
    {
        "aria",
        "deepseek_vl",
        "exaone4_5",
        "gemma3",
        "gemma4",
        "got_ocr2",
        "hyperclovax_vision_v2",
        "idefics2",
        "idefics3",
        "internvl",
        "lfm2_vl",
        "lighton_ocr",
        "llama4",
        "llava",
        "llava_next",
        "llava_next_video",
        "llava_onevision",
        "minicpmv4_6",
        "mistral3",
        "ovis2",
        "qwen2_5_vl",
        "qwen2_vl",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_vl",
        "qwen3_vl_moe",
        "smolvlm",
        "video_llama_3",
        "video_llava",
        "vipllava",
    }
)
# transformers has no causal class for these. Three rotary positions that are all the same, as in
# text, are one.
_EQUIVALENT: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl_text": ("qwen2", {}),
    "qwen2_5_vl_text": ("qwen2", {}),
    "qwen3_vl_text": ("qwen3", {}),
    "qwen3_vl_moe_text": ("qwen3_moe", {"norm_topk_prob": True}),
}
# Patterns of names in the checkpoint and what stands for them in the causal model, for
# from_pretrained(key_mapping=...).
TENSOR_NAMES = {
    r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?(?!lm_head\.)": "model.",
    r"^(?:model\.)?(?:language_model|text_model)\.lm_head\.": "lm_head.",
}
_PARTS = (
    "text_config",
    "llm_config",
    "language_config",
    "thinker_config",
    "vision_config",
    "audio_config",
)


def is_multimodal(settings: Mapping[str, Any]) -> bool:
    """Whether config.json is that of a model with several parts."""
    return any(isinstance(settings.get(part), Mapping) for part in _PARTS)


def check_text_model(model_type: str | None, *, key: str, name: str) -> None:
    """Raises ConfigError for a multimodal model whose text model cannot be run alone.

    key: where the configuration names the model, for messages.
    """
    import transformers

    what = f"{key}: {name} is a multimodal model (model_type {model_type})"
    if model_type not in TEXT_MODELS:
        raise ConfigError(
            f"{what}, and its text model is not known to say alone what it says there: save its "
            "text model with save_pretrained as a causal language model and give that folder. "
            f"Known are {', '.join(sorted(TEXT_MODELS))}"
        )
    if transformers.__version__.startswith("4."):
        raise ConfigError(
            f"{what}, whose text model is loaded by transformers 5, found "
            f"{transformers.__version__}: install transformers 5, or give its text model, saved "
            "as a causal language model"
        )


def text_settings(settings: Any) -> Any:
    """Returns the settings of the causal model for a multimodal model's text.

    settings: the whole model's transformers configuration. Special tokens, and whether the head is
    tied to the embedding, are the whole model's: its text_config may say something else.
    """
    from transformers import AutoConfig

    text = settings.get_text_config()
    equivalent = _EQUIVALENT.get(text.model_type)
    if equivalent is not None:
        kind, more = equivalent
        values = {k: v for k, v in text.to_dict().items() if k not in ("model_type", "dtype")}
        values["rope_parameters"] = {
            k: v for k, v in values["rope_parameters"].items() if not k.startswith("mrope")
        }
        text = AutoConfig.for_model(kind, **values | more)
    text.tie_word_embeddings = settings.tie_word_embeddings
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(settings, name, None) is not None:
            setattr(text, name, getattr(settings, name))
    return text
