"""Metadata of a model, read before it is loaded: config.json and the headers of its weights.

For the checks before a run and for the plan. Reads a folder, or what the hub's cache holds, or
fetches config.json (a few kB) from the hub; never weights. Imports no torch.
"""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megadistill.errors import ConfigError, first_line
from megadistill.models.adapters import Adapter, find_adapter
from megadistill.models.checkpoint_files import (
    TensorHeader,
    ignored_files,
    missing_end,
    read_header,
    weight_files,
)
from megadistill.models.context_length import longest_sequence
from megadistill.models.hub import in_cache, require_hub

_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf")


@dataclass(frozen=True)
class ModelFiles:
    """A model's folder (or its part of the hub's cache) and its config.json.

    key   where the configuration names it, for messages: teacher.model, student.model
    name  how it names it: a folder or a hub id
    adapter  where that is an adapter; folder and settings are then those of its base
    """

    key: str
    name: str
    revision: str | None
    folder: Path
    settings: dict[str, Any]
    on_hub: bool
    adapter: Adapter | None = None

    def get(self, *names: str) -> Any:
        """The first of `names` that config.json has, of its text model where there are several."""
        for level in (self.settings.get("text_config") or {}, self.settings):
            for name in names:
                if level.get(name) is not None:
                    return level[name]
        return None

    @property
    def vocab_size(self) -> int | None:
        return self.get("vocab_size")

    @property
    def max_positions(self) -> int | None:
        """The longest sequence it was made for, in tokens."""
        return longest_sequence(self.settings | (self.settings.get("text_config") or {}))

    @property
    def hidden_size(self) -> int | None:
        return self.get("hidden_size", "n_embd", "d_model")

    @property
    def layers(self) -> int | None:
        return self.get("num_hidden_layers", "n_layer", "num_layers")

    @property
    def heads(self) -> int | None:
        return self.get("num_attention_heads", "n_head")

    @property
    def kv_heads(self) -> int | None:
        return self.get("num_key_value_heads") or self.heads

    def weights(self) -> list[Path]:
        """The safetensors files that transformers loads, whether or not they are here."""
        with self._named():
            return weight_files(self.folder, self.settings)

    def ignored_weights(self) -> list[str]:
        """The names of safetensors files in its folder that transformers does not load."""
        return ignored_files(self.folder, self.settings)

    def incomplete_weights(self) -> str | None:
        """Describes what is missing of its safetensors files; None if nothing is."""
        files = self.weights()
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            return f"{len(missing)} of {len(files)} files, {missing[0]} the first"
        for file in files:
            with self._named():
                sizes = missing_end(file)
            if sizes is not None:
                return f"the end of {file.name}, which has {sizes[0]:,} of {sizes[1]:,} bytes"
        return None

    def tensors(self) -> dict[str, TensorHeader] | None:
        """The tensors of its weights by name, or None where files are not on this machine."""
        files = self.weights()
        if not files or not all(file.is_file() for file in files):
            return None
        with self._named():
            return {name: tensor for file in files for name, tensor in read_header(file).items()}

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """An error about one of its files says where the configuration names the model."""
        try:
            yield
        except ConfigError as error:
            raise ConfigError(f"{self.key}: {error}") from None

    def other_weights(self) -> list[str]:
        """Names of weights in other formats, which may run code when they are read."""
        found = [path.name for pattern in _OTHER_WEIGHTS for path in self.folder.glob(pattern)]
        return sorted(name for name in found if name != "training_args.bin")

    def parameters(self) -> tuple[int, bool] | None:
        """(number of parameters, whether counted); None where config.json does not tell.

        Counted in the weights' headers, else worked out of config.json for a Llama-like model.
        """
        tensors = self.tensors()
        if tensors is not None:
            return sum(tensor.elements for tensor in tensors.values()), True
        worked_out = self._from_settings()
        return None if worked_out is None else (worked_out, False)

    def _from_settings(self) -> int | None:
        hidden, layers, heads, vocab = self.hidden_size, self.layers, self.heads, self.vocab_size
        inner = self.get("intermediate_size", "n_inner") or (hidden and 4 * hidden)
        if not (hidden and layers and heads and vocab and inner and self.kv_heads):
            return None
        head_dim = self.get("head_dim") or hidden // heads
        attention = 2 * hidden * head_dim * (heads + self.kv_heads)
        experts = self.get("num_local_experts", "num_experts", "n_routed_experts") or 1
        expert_inner = (experts > 1 and self.get("moe_intermediate_size")) or inner
        gated = 2 if self.settings.get("model_type") in ("gpt2", "gpt_neox", "opt") else 3
        embeddings = vocab * hidden * (1 if self.get("tie_word_embeddings") else 2)
        layer = attention + experts * gated * hidden * expert_inner + 2 * hidden
        return embeddings + layers * layer + hidden


def find_model(
    name: str | None, *, key: str, revision: str | None = None, fetch: bool = True
) -> ModelFiles:
    """The model in a folder, or on the hub.

    fetch  whether to ask the hub for what is not in its cache here
    ConfigError: it is in neither place, or its config.json is missing or damaged.
    """
    if name is None:
        raise ConfigError(f"{key}: missing, expected a folder or a hub id: set {key}")
    adapter = find_adapter(name, key=key)
    if adapter is not None:
        if find_adapter(adapter.base, key=key) is not None:
            raise ConfigError(f"{key}: {name} is an adapter of an adapter: merge one of them")
        base = find_model(adapter.base, key=key, revision=adapter.revision, fetch=fetch)
        return replace(base, name=name, adapter=adapter)
    folder = Path(name).expanduser()
    on_hub = not folder.is_dir() and may_be_hub_id(name) and not _looks_local(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"{key}: {name} holds no config.json, expected a model's folder, as "
                "save_pretrained writes it"
            )
    elif on_hub:
        folder = _hub_config(name, key=key, revision=revision, fetch=fetch).parent
    else:
        what = "is a file" if folder.exists() else f"does not exist{similar(folder)}"
        raise ConfigError(
            f"{key}: {name} {what}, expected a model's folder, or a hub id (owner/name)"
        )
    settings = _read_json(folder / "config.json", key=key)
    return ModelFiles(key, name, revision, folder, settings, on_hub)


def similar(path: Path) -> str:
    """A question about a folder beside `path` that has a similar name; empty without one."""
    names = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" (is {path.with_name(close[0])} meant?)" if close else ""


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder holds a tokenizer.

    transformers 5 makes one for a folder without: of the right class, with hardly a token in it.
    """
    return any((folder / name).is_file() for name in _TOKENIZER)


def tokenizer_source(name: str, revision: str | None, *, key: str) -> tuple[str, str | None]:
    """Returns (name, revision) of the model that has `name`'s tokenizer: an adapter may have none.

    key: where the configuration names it, for messages.
    """
    adapter = find_adapter(name, key=key)
    if adapter is None or has_tokenizer(adapter.folder):
        return name, revision
    return adapter.base, adapter.revision


def require_tokenizer(name: str, revision: str | None, *, key: str) -> None:
    """ConfigError where a tokenizer is neither in a folder nor cached and the hub is unreachable.

    key: where the configuration names it, for messages.
    """
    here = Path(name).expanduser().exists() or not may_be_hub_id(name)
    if not here and not any(in_cache(name, file, revision=revision) for file in _TOKENIZER):
        require_hub(name, key=key)


def may_be_hub_id(name: str) -> bool:
    """Whether `name` has the form owner/name, or name alone, that the hub gives its models."""
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def _looks_local(name: str) -> bool:
    """Whether `name` is meant as a path although it could be a hub id: its first folder is here."""
    return Path(name).exists() or ("/" in name and Path(name).parent.is_dir())


def _hub_config(name: str, *, key: str, revision: str | None, fetch: bool) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging as hub_logging

    cached = in_cache(name, "config.json", revision=revision)
    if cached is not None:
        return cached
    if not fetch:
        raise ConfigError(f"{key}: {name} is no folder here, and not in the hub's cache")
    require_hub(name, key=key)
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # six lines for each of six attempts, and one of ours after
    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except Exception as error:  # noqa: BLE001 - the client raises its own, httpx's and OSError
        raise ConfigError(
            f"{key}: {name} is no folder here, and cannot be had from the hub "
            f"({type(error).__name__}: {first_line(error)}): check the name, `hf auth login` for a "
            "gated model, or download it and give the folder"
        ) from None
    finally:
        hub_logging.set_verbosity(verbosity)


def hub_file_names(model: ModelFiles) -> list[str] | None:
    """The names of all files of a hub model, or None where the hub cannot be asked."""
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(model.name, revision=model.revision)
    except Exception:  # noqa: BLE001 - offline: what is in the cache has to do
        return None


def _read_json(path: Path, *, key: str | None = None) -> dict[str, Any]:
    where = f"{key}: {path}" if key else str(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: cannot be read: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: expected an object, found a {type(found).__name__}")
    return found
