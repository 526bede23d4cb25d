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

from megadistill.config import Config
from megadistill.errors import ConfigError

# Keys of config.json that change with the library or the copy, never with what the model computes.
_INCIDENTAL = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")


def cache_recipe(config: Config, tokens_recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe of the cache that `config` asks for, over the token store of `tokens_recipe`.

    Reads every byte of the teacher's weights once. Raises ConfigError when they cannot be found.
    """
    teacher, targets = config.teacher, config.targets
    folder = model_folder(teacher.model, teacher.revision, key="teacher.model")
    method = {"tau": targets.tau} if targets.method == "varopt" else {"k": targets.k}
    return {
        "attention": teacher.attention,
        "dtype": teacher.dtype,
        "engine": teacher.engine,
        "method": targets.method,
        "micro_batch": teacher.micro_batch,
        "positions": targets.positions,
        "seed": targets.seed,
        "seq_len": config.data.seq_len,
        "teacher": model_identity(folder),
        "temperature": targets.temperature,
        "tokenizer": tokens_recipe["tokenizer"],
        "tokens": tokens_recipe,
        "tp": teacher.tp,
        "vocab_size": vocabulary_size(folder),
        **method,
    }


def made_with(*, device: str, accelerator: str, cpu_threads: int) -> dict[str, Any]:
    """What of the machine a block's bytes may depend on."""
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers")
    }
    return {**versions, "accelerator": accelerator, "cpu_threads": cpu_threads, "device": device}


def model_folder(model: str, revision: str | None, *, key: str) -> Path:
    """The folder that holds `model`: itself, or the snapshot downloaded from the hub."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(model, revision=revision, allow_patterns=["*.json", "*.safetensors"])
        )
    except Exception as error:  # the hub client's errors share no base below Exception
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{key}: {model} is neither a folder nor a model that can be had from the hub "
            f"({type(error).__name__}: {reason})"
        ) from error


def model_identity(folder: Path) -> dict[str, str]:
    """{"architecture", "config", "weights"}: name and content hashes of a model on disk."""
    settings = json.loads((folder / "config.json").read_text())
    architecture = (settings.get("architectures") or ["unknown"])[0]
    for name in _INCIDENTAL:
        settings.pop(name, None)
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":")).encode()
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ConfigError(
            f"teacher.model: {folder} holds no .safetensors file: only safetensors weights are "
            "loaded; convert the model with save_pretrained(..., safe_serialization=True)"
        )
    digest = hashlib.sha256()
    for path in weights:
        digest.update(path.name.encode() + _file_hash(path))
    return {
        "architecture": architecture,
        "config": hashlib.sha256(canonical).hexdigest()[:32],
        "weights": digest.hexdigest()[:32],
    }


def vocabulary_size(folder: Path) -> int:
    """Ids the model's head gives: config.json's vocab_size (of the text part)."""
    settings = json.loads((folder / "config.json").read_text())
    return int(settings.get("vocab_size") or settings["text_config"]["vocab_size"])


def _file_hash(path: Path) -> bytes:
    # xxh3 keeps up with any disk; a cryptographic hash would be the slowest part of starting.
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(16 << 20):
            state.update(chunk)
    return state.digest()
