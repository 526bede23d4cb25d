"""The recipe: everything that a cache's bytes depend on and that the configuration decides.

Written first into cache.json, compared on every later run: a store is never continued with another
recipe. Models are named by content, not by path, so that a copied folder is the same teacher and a
replaced weight file is another. What the machine decides stands in `made_with`, in each block's
marker: it is recorded and warned of, not refused.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import xxhash

from megadistill.blocks import BlockReader, open_store
from megadistill.blocks.layout import kind_of
from megadistill.cache.recorded_method import distribution_of, version_of
from megadistill.config import Config, TeacherConfig
from megadistill.data.token_plan import TokenPlan
from megadistill.errors import ConfigError, first_line
from megadistill.models.adapters import SETTINGS, WEIGHTS
from megadistill.models.checkpoint_files import weight_files
from megadistill.models.model_files import ModelFiles, find_model
from megadistill.models.pretrained import attention_of, model_settings
from megadistill.targets import find_method

# Keys of config.json that change with the library or the copy, never with what the model computes.
_INCIDENTAL = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")


def cache_recipe(
    config: Config,
    tokens: BlockReader | TokenPlan,
    *,
    key: str = "teacher.model",
    identity: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The recipe of the cache that `config` asks for, over a token store.

    key: where the configuration names the teacher, for messages. identity: the teacher's, where it
    is known; else every byte of its weights is read once. Raises ConfigError when they cannot be
    found.
    """
    tokens_recipe = tokens.recipe
    teacher, targets = config.teacher, config.targets
    if identity is None:
        files = find_model(teacher.model, key=key, revision=teacher.revision)
        identity = model_identity(_with_weights(files), adapter_folder(files))
    chosen = find_method(targets.method, "targets.method")
    method = chosen.record(chosen.read(targets)) | distribution_of(targets.method)
    if targets.positions == "entropy":
        method["min_entropy"] = targets.min_entropy
    return {
        "attention": attention_of(teacher, model_settings(teacher, key=key)),
        "dtype": teacher.dtype,
        "engine": teacher.engine,
        "entropy": targets.entropy,
        "method": targets.method,
        "micro_batch": teacher.micro_batch,
        "nll": targets.nll,
        "positions": chosen_positions(config, tokens),
        "seed": targets.seed,
        "seq_len": config.data.seq_len,
        "teacher": identity,
        "temperature": targets.temperature,
        "tokenizer": tokens_recipe["tokenizer"],
        "tokens": tokens_recipe,
        "tp": teacher.tp,
        # Ids above the tokenizer's are padding, see TeacherHead.of.
        "vocab_size": tokens_recipe["tokenizer"]["vocab_size"],
        **method,
    }


def chosen_positions(config: Config, tokens: BlockReader | TokenPlan) -> str:
    """`targets.positions`, or where it is not set what the data suggests.

    A cache that was begun keeps to its own. ConfigError for `loss_mask` without a loss mask.
    """
    masked = "loss_mask" in tokens.columns
    wanted = config.targets.positions
    if wanted == "loss_mask" and not masked:
        raise ConfigError(
            f"targets.positions: loss_mask, and {tokens.name} has no loss mask: tokenise chats "
            "(data.messages_field) or prompts with completions (data.prompt_field, "
            "data.completion_field), or set targets.positions=all"
        )
    if wanted is not None:
        return wanted
    if config.teacher.mode == "online":
        return "all"  # nothing is kept of a position that the loss mask leaves out
    begun = _begun(config)
    return begun if begun in ("all", "loss_mask") else "loss_mask" if masked else "all"


def _begun(config: Config) -> Any:
    """The positions of the cache at `cache.dir`; None where there is none, or not a block of it."""
    cache = config.cache
    if not cache.is_folder or kind_of(Path(cache.folder)) != "cache":
        return None
    store = open_store(cache.folder)
    return store.recipe.get("positions") if store.present() else None


def made_with(*, device: str, accelerator: str, cpu_threads: int, method: str) -> dict[str, Any]:
    """Returns the versions and the hardware that a block's bytes may depend on."""
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers")
    }
    return {
        **versions,
        **version_of(method),
        "accelerator": accelerator,
        "cpu_threads": cpu_threads,
        "device": device,
    }


def model_identity(folder: Path, adapter: Path | None = None) -> dict[str, str]:
    """{"architecture", "config", "weights"}: name and content hashes of a model on disk.

    adapter: the folder of a LoRA adapter that is merged into it.
    """
    settings = json.loads((folder / "config.json").read_text())
    architecture = (settings.get("architectures") or ["unknown"])[0]
    weights = weight_files(folder, settings)
    if not weights:
        raise ConfigError(
            f"teacher.model: {folder} holds neither model.safetensors nor "
            "model.safetensors.index.json: only safetensors weights are loaded; convert the model "
            "with save_pretrained"
        )
    if adapter is not None:
        weights += [adapter / WEIGHTS]
        settings["adapter"] = _adapter_settings(adapter)
    digest = hashlib.sha256()
    for path in weights:
        digest.update(path.name.encode() + _file_hash(path))
    return {
        "architecture": architecture,
        "config": config_hash(settings),
        "weights": digest.hexdigest()[:32],
    }


def _adapter_settings(adapter: Path) -> dict[str, Any]:
    """Returns the adapter's adapter_config.json, without the location of its base model."""
    settings = json.loads((adapter / SETTINGS).read_text())
    return {k: v for k, v in settings.items() if k not in ("base_model_name_or_path", "revision")}


def config_hash(settings: dict[str, Any]) -> str:
    """The content hash of a config.json, without the keys that a library or a copy changes."""
    kept = {name: value for name, value in settings.items() if name not in _INCIDENTAL}
    canonical = json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(canonical).hexdigest()[:32]


def adapter_folder(files: ModelFiles) -> Path | None:
    """The folder of the adapter that is merged into a model, or None."""
    return None if files.adapter is None else files.adapter.folder


def _with_weights(files: ModelFiles) -> Path:
    """The model's folder; one of the hub is downloaded into the hub's cache first."""
    if not files.on_hub:
        return files.folder
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.safetensors"]
        return Path(snapshot_download(files.name, revision=files.revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{files.key}: {files.name} cannot be downloaded from the hub: {first_line(error)}"
        ) from error


def weights_are_here(teacher: TeacherConfig) -> bool:
    """Whether the teacher's weights can be read without a download."""
    files = find_model(teacher.model, key="teacher.model", revision=teacher.revision)
    return not files.on_hub or files.tensors() is not None


def _file_hash(path: Path) -> bytes:
    # xxh3 keeps up with any disk; a cryptographic hash would be the slowest part of starting.
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(16 << 20):
            state.update(chunk)
    return state.digest()
