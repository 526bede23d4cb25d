"""What a model says about itself before it is loaded: config.json and the headers of its weights.

For the checks before a run and for the plan. Reads a folder, or what the hub's cache holds, or
fetches config.json (a few kB) from the hub; never weights. Imports no torch.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadistill.errors import ConfigError

_MAX_HEADER = 1 << 28  # bytes; a safetensors header is some 100 bytes a tensor
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf")


@dataclass(frozen=True)
class ModelFiles:
    """A model's folder (or its part of the hub's cache) and its config.json.

    key   where the configuration names it, for messages: teacher.model, student.model
    name  how it names it: a folder or a hub id
    """

    key: str
    name: str
    revision: str | None
    folder: Path
    settings: dict[str, Any]
    on_hub: bool

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
        return self.get("max_position_embeddings", "n_positions", "max_sequence_length")

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
        """Its safetensors files, as far as they are on this machine."""
        return sorted(self.folder.glob("*.safetensors"))

    def incomplete_weights(self) -> str | None:
        """What is missing of the safetensors files in its folder, or None."""
        files = {file.name: file for file in self.weights()}
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(_read_json(index, key=self.key).get("weight_map", {}).values()))
            missing = [name for name in names if name not in files]
            if missing:
                return f"{len(missing)} of {len(names)} files, {missing[0]} the first"
        for name, file in files.items():
            size, expected = file.stat().st_size, _expected_size(file)
            if size < expected:
                return f"the end of {name}, which has {size:,} of {expected:,} bytes"
        return None

    def other_weights(self) -> list[str]:
        """Names of weights in other formats, which may run code when they are read."""
        found = [path.name for pattern in _OTHER_WEIGHTS for path in self.folder.glob(pattern)]
        return sorted(name for name in found if name != "training_args.bin")

    def float8_tensor(self) -> str | None:
        """A tensor of eight-bit floats among the weights that are here, or None."""
        for file in self.weights():
            for name, tensor in _header(file).items():
                if name != "__metadata__" and str(tensor.get("dtype")).startswith("F8_"):
                    return name
        return None

    def parameters(self) -> tuple[int, bool] | None:
        """(number of parameters, whether counted); None where config.json does not tell.

        Counted in the weights' headers, else worked out of config.json for a Llama-like model.
        """
        index = self.folder / "model.safetensors.index.json"
        files = self.weights()
        if index.is_file():
            names = set(_read_json(index).get("weight_map", {}).values())
            files = [file for file in files if file.name in names]
            if len(files) < len(names):
                files = []
        if files:
            return sum(_elements(file) for file in files), True
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
    folder = Path(name).expanduser()
    on_hub = not folder.is_dir() and may_be_hub_id(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"{key}: {name} holds no config.json, expected a model's folder, as "
                "save_pretrained writes it"
            )
    elif on_hub:
        folder = _hub_config(name, key=key, revision=revision, fetch=fetch).parent
    else:
        what = "is a file" if folder.exists() else "does not exist"
        raise ConfigError(
            f"{key}: {name} {what}, expected a model's folder, or a hub id (owner/name)"
        )
    settings = _read_json(folder / "config.json", key=key)
    return ModelFiles(key, name, revision, folder, settings, on_hub)


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder holds a tokenizer.

    transformers 5 makes one for a folder without: of the right class, with hardly a token in it.
    """
    return any((folder / name).is_file() for name in _TOKENIZER)


def may_be_hub_id(name: str) -> bool:
    """Whether `name` has the form owner/name, or name alone, that the hub gives its models."""
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def _hub_config(name: str, *, key: str, revision: str | None, fetch: bool) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import logging as hub_logging

    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:
        cached = None
    if isinstance(cached, str):
        return Path(cached)
    if not fetch:
        raise ConfigError(f"{key}: {name} is no folder here, and not in the hub's cache")
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


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _read_json(path: Path, *, key: str | None = None) -> dict[str, Any]:
    where = f"{key}: {path}" if key else str(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: cannot be read: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: expected an object, found a {type(found).__name__}")
    return found


def _elements(file: Path) -> int:
    return sum(_products(_header(file)))


def _expected_size(file: Path) -> int:
    """The bytes that a safetensors file has by its own header."""
    header = _header(file)
    with file.open("rb") as stream:
        start = 8 + struct.unpack("<Q", stream.read(8))[0]
    ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
    return start + max(ends, default=0)


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        start = stream.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER + 1
        text = stream.read(size) if size <= _MAX_HEADER else b""
    try:
        return json.loads(text)
    except ValueError:
        raise ConfigError(f"{file}: not a safetensors file: its header cannot be read") from None


def _products(header: dict[str, Any]) -> Iterator[int]:
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        product = 1
        for size in tensor["shape"]:
            product *= size
        yield product
