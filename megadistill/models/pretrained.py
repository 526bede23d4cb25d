"""A model of transformers from its files: the one way in for teacher and student.

Weights come from safetensors only, and code that comes with a model runs only where the
configuration says so.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import nn

from megadistill.config import StudentConfig, TeacherConfig
from megadistill.errors import ConfigError, first_line
from megadistill.models.adapters import Adapter, find_adapter, merge
from megadistill.models.checkpoint_tensors import check_loaded
from megadistill.models.text_models import (
    TENSOR_NAMES,
    check_text_model,
    is_multimodal,
    text_settings,
)

log = logging.getLogger(__name__)


def backbone(model: Any) -> Any:
    """The part of a causal language model that ends in hidden states; `model` where it has none."""
    if model.base_model is not model:
        return model.base_model
    decoder = getattr(model, "get_decoder", lambda: None)()  # Gemma 3 in transformers 4
    if decoder is None or decoder is model:
        decoder = getattr(model, "model", None)  # Llama 4, whose prefix is of its multimodal model
    return decoder if isinstance(decoder, nn.Module) else model


def model_settings(config: TeacherConfig | StudentConfig, *, key: str) -> Any:
    """The transformers configuration of the model that `config` names; of a text model alone.

    key: where the configuration names it, for messages. ConfigError where there is none to be had.
    """
    return settings_and_names(config, key=key)[0]


def settings_and_names(
    config: TeacherConfig | StudentConfig, *, key: str
) -> tuple[Any, dict[str, str] | None]:
    """Returns `model_settings`, and patterns from tensor names in the files to those in the model.

    The patterns are None where the names are the same: in any model but the text model of a
    multimodal one.
    """
    from transformers import AutoConfig

    _, name, revision = _source(config, key=key)
    try:
        whole = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:
        raise ConfigError(
            f"{key}: {config.model} cannot be read ({type(error).__name__}: {first_line(error)})"
        ) from error
    own_code = "AutoModelForCausalLM" in (getattr(whole, "auto_map", None) or {})
    if (own_code and config.trust_remote_code) or not is_multimodal(whole.to_dict()):
        return whole, None
    check_text_model(whole.model_type, key=key, name=str(config.model))
    return text_settings(whole), TENSOR_NAMES


def _source(
    config: TeacherConfig | StudentConfig, *, key: str
) -> tuple[Adapter | None, str | None, str | None]:
    """(adapter, name, revision): of an adapter's base, or the configured model itself."""
    adapter = find_adapter(config.model, key=key)
    if adapter is None:
        return None, config.model, config.revision
    return adapter, adapter.base, adapter.revision


def attention_of(config: TeacherConfig | StudentConfig, settings: Any) -> str:
    """The attention implementation that runs: eager for a model that has no sdpa.

    settings: the model's transformers configuration.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(settings), None)
    # A model with code of its own is not in the mapping: its class is asked when it is loaded.
    kind = found[0] if isinstance(found, tuple) else found
    has_sdpa = getattr(kind, "_supports_sdpa", True)
    return "eager" if config.attention == "sdpa" and not has_sdpa else config.attention


def log_attention(config: TeacherConfig | StudentConfig, settings: Any, *, key: str) -> None:
    """Logs one line if another attention implementation runs than the configured one.

    key: where the configuration names the model.
    """
    runs = attention_of(config, settings)
    if runs != config.attention:
        log.info(
            "%s: transformers has no %s attention for model_type %s: it runs with %s attention",
            key,
            config.attention,
            settings.model_type,
            runs,
        )


def load_pretrained(
    config: TeacherConfig | StudentConfig, *, key: str, dtype: torch.dtype, merged: bool = True
) -> Any:
    """The causal language model that `config` names, its weights in `dtype`.

    key: where the configuration names it, for messages. merged: whether an adapter is merged into
    its base, or left to the caller. ConfigError where the model cannot be loaded, or where its
    checkpoint does not supply all of its tensors.
    """
    import transformers
    from transformers import AutoModelForCausalLM
    from transformers.integrations import is_deepspeed_zero3_enabled
    from transformers.utils import logging as transformers_logging

    # Under ZeRO-3 transformers 4 compares shapes with those of partitioned, empty parameters.
    compared = not (is_deepspeed_zero3_enabled() and transformers.__version__.startswith("4."))
    if os.environ.get("RANK", "0") != "0":
        transformers_logging.disable_progress_bar()  # one bar is enough
    adapter, name, revision = _source(config, key=key)
    settings, names = settings_and_names(config, key=key)
    of_text_model = {} if names is None else {"config": settings, "key_mapping": names}
    attention = attention_of(config, settings)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=compared,
            output_loading_info=True,
            **of_text_model,
        )
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"{key}: {config.model} cannot be loaded: {first_line(error)}") from error
    check_loaded(model, report, name=str(name), key=key)
    return merge(model, adapter, key=key) if adapter is not None and merged else model
