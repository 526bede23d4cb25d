"""Whether the models are what the configuration takes them for, by config.json and file names."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from typing import Any

import torch

from megadistill.config import Config, StudentConfig, TeacherConfig
from megadistill.errors import ConfigError
from megadistill.models import context_length
from megadistill.models.checkpoint_files import INDEX, SINGLE
from megadistill.models.checkpoint_tensors import check_tensors
from megadistill.models.model_files import ModelFiles, find_model, hub_file_names
from megadistill.models.pretrained import backbone, model_settings, settings_and_names
from megadistill.models.text_models import check_text_model, is_multimodal
from megadistill.student.features import feature_plan

log = logging.getLogger(__name__)


def find_section_model(
    section: TeacherConfig | StudentConfig, key: str, *, fetch: bool = True
) -> ModelFiles:
    """The files of a section's model."""
    return find_model(section.model, key=key, revision=section.revision, fetch=fetch)


def check_model(
    section: TeacherConfig | StudentConfig, key: str, *, with_weights: bool
) -> ModelFiles:
    """The model's files; refused: no causal language model, weights that could run code, none."""
    model = find_section_model(section, key)
    _causal(model, trusted=section.trust_remote_code)
    _not_quantised(model)
    if with_weights:
        _safetensors(model)
    if section.attention == "flash_attention_2" and not importlib.util.find_spec("flash_attn"):
        part = key.rpartition(".")[0]
        raise ConfigError(
            f"{part}.attention: flash_attention_2 needs the package flash-attn, which is not "
            f"installed: install it, or set {part}.attention=sdpa"
        )
    return model


def check_complete(section: TeacherConfig | StudentConfig, model: ModelFiles) -> None:
    """The weights are those that the model needs, as far as their files are on this machine."""
    tensors = model.tensors()
    if tensors is not None:
        settings, names = settings_and_names(section, key=model.key)
        empty = check_tensors(section, settings, tensors, key=model.key, names=names)
        if empty is not None:
            _gives_hidden_states(empty, model)


def _gives_hidden_states(empty: Any, model: ModelFiles) -> None:
    """ConfigError for a model whose backbone returns no last hidden states, or that has no head.

    empty: the model on the meta device. A forward that needs real numbers says nothing.
    """
    core = backbone(empty)
    lacks = None
    if empty.get_output_embeddings() is None:
        lacks = "no output projection over its vocabulary"
    elif core is empty:
        lacks = "no backbone apart from its head"
    else:
        ids = torch.zeros(1, 2, dtype=torch.int64, device="meta")
        with contextlib.suppress(Exception), torch.no_grad():
            if not hasattr(core(input_ids=ids, use_cache=False), "last_hidden_state"):
                lacks = f"no last_hidden_state in what {type(core).__name__} returns"
    if lacks is not None:
        raise ConfigError(
            f"{model.key}: {model.name}: {type(empty).__name__} ({empty.config.model_type}) has "
            f"{lacks}: use another architecture, a decoder-only transformer such as Llama"
        )


def _not_quantised(model: ModelFiles) -> None:
    """Weights are floating-point numbers that DeepSpeed can shard, partition and train."""
    found = model.get("quantization_config", "compression_config")
    # A folder that transformers wrote of a dequantised fp8 model has fp8 weights all the same, and
    # says so nowhere in its config.json: it would be loaded without its scales.
    dtypes = {name: tensor.dtype for name, tensor in (model.tensors() or {}).items()}
    small = next((name for name in dtypes if dtypes[name].startswith(_SMALL_DTYPES)), None)
    if not found and small is None:
        return
    what = f"{small} has dtype {dtypes[small]}" if small else ""
    if found:
        method = found.get("quant_method", "unknown") if isinstance(found, dict) else found
        what = f"quant_method {method} in its config.json"
    raise ConfigError(
        f"{model.key}: {model.name} is quantised ({what}), expected weights in bfloat16, float16 "
        "or float32: give the model it was made from, or one whose weights were converted to "
        "bfloat16 with their scales"
    )


_SMALL_DTYPES = ("F8_", "F4", "F6_", "U8", "I8")


def _causal(model: ModelFiles, *, trusted: bool) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    own_code = "AutoModelForCausalLM" in (model.settings.get("auto_map") or {})
    if own_code and trusted:
        return
    key = model.key.rpartition(".")[0]
    if is_multimodal(model.settings) and not own_code:
        kind = model.settings.get("model_type")
        check_text_model(kind, key=model.key, name=model.name)
        log.info("%s: %s is multimodal (%s): its text model is used", model.key, model.name, kind)
        return
    kind, classes = model.settings.get("model_type"), model.settings.get("architectures") or []
    known: set[str] = set()
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        known.update([name] if isinstance(name, str) else name)
    if classes and known.intersection(classes):
        return
    if not classes and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    if own_code:
        raise ConfigError(
            f"{model.key}: {model.name} brings code of its own, which is not run unless you say "
            f"so: read it, and set {key}.trust_remote_code=true"
        )
    what = ", ".join(classes) if classes else f"model_type {kind!r}"
    raise ConfigError(
        f"{model.key}: {model.name} is no causal language model: its config.json says {what}, "
        "expected one that AutoModelForCausalLM loads, such as LlamaForCausalLM"
    )


def _safetensors(model: ModelFiles) -> None:
    """Checks for weights that transformers loads, and that cannot run code."""
    names = hub_file_names(model) if model.on_hub else None
    if names is None and model.on_hub and not model.weights() and not model.other_weights():
        return  # offline, and not downloaded: loading will say so
    if names is not None:
        if SINGLE in names or INDEX in names:
            return
        ignored = [name for name in names if name.endswith(".safetensors")]
        others = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    elif model.weights():
        missing = model.incomplete_weights()
        if missing:
            raise ConfigError(
                f"{model.key}: {model.name} lacks {missing}: copy or download it again"
            )
        return
    else:
        ignored, others = model.ignored_weights(), model.other_weights()
    if ignored:
        raise ConfigError(
            f"{model.key}: {model.name} has {ignored[0]}, and neither {SINGLE} nor {INDEX}, which "
            "transformers loads: copy the missing file, or convert the model with save_pretrained"
        )
    if others:
        raise ConfigError(
            f"{model.key}: {model.name} has its weights as {others[0]}, which can run code when it "
            "is read, expected safetensors: load and save_pretrained it once where you trust it"
        )
    hint = ", or set student.init=random" if model.key == "student.model" else ""
    raise ConfigError(
        f"{model.key}: {model.name} holds no weights, expected {SINGLE} beside config.json{hint}"
    )


def check_seq_len(seq_len: int, model: ModelFiles) -> None:
    """The sequences are no longer than the model was made for."""
    longest = model.max_positions
    context_length.check_seq_len(
        seq_len,
        longest,
        model=f"{model.key} ({model.name})",
        way_out=f"set data.seq_len to {longest} or less",
    )


def check_heads(tp: int, teacher: ModelFiles) -> None:
    """The tp ranks of a group divide the teacher's attention heads and key-value heads."""
    for what, count in (("attention heads", teacher.heads), ("key-value heads", teacher.kv_heads)):
        if count is not None and count % tp:
            fitting = [
                t for t in range(1, count + 1) if not count % t and not (teacher.heads or count) % t
            ]
            raise ConfigError(
                f"teacher.tp: {tp} does not divide the {count} {what} of {teacher.name}: set it to "
                f"one of {', '.join(map(str, fitting))}, or use teacher.engine=zero3 with "
                "teacher.tp=1"
            )


def check_features(config: Config) -> None:
    """The layers to be aligned are layers of teacher and student, and their widths agree."""
    if config.student is not None and config.teacher.mode == "online":
        feature_plan(config, model_settings(config.student, key="student.model"))
