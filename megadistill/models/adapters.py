"""LoRA adapters given in the place of a model: found, checked, and merged into their base by peft.

A folder with an adapter_config.json is an adapter. Its base is the folder or hub id that the file
names; the base's config.json and weights are the model's, and the adapter's weights are added to
them once, after loading. peft is an extra: `pip install megadistill[peft]`.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadistill.errors import ConfigError, first_line
from megadistill.models.checkpoint_files import INDEX, SINGLE

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MERGED = "merge it once with peft (merge_and_unload, then save_pretrained) and give that folder"


@dataclass(frozen=True)
class Adapter:
    """A folder that holds an adapter, and the model that it was trained on."""

    folder: Path
    base: str
    revision: str | None


def find_adapter(name: str | None, *, key: str) -> Adapter | None:
    """Returns the adapter in the folder `name`, or None where that is none.

    key: where the configuration names it, for messages. ConfigError for an adapter that is damaged,
    cannot be merged, or lies beside a complete model.
    """
    folder = Path(name or "").expanduser()
    if not name or not (folder / SETTINGS).is_file():
        return None
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        kind, base = settings.get("peft_type"), settings.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{key}: {folder / SETTINGS}: cannot be read: {first_line(error)}"
        ) from None
    what = f"{key}: {name} is an adapter ({SETTINGS})"
    if any((folder / name).exists() for name in (SINGLE, INDEX)):
        raise ConfigError(f"{what} and a complete model: remove the one that is not meant")
    if kind != "LORA":
        raise ConfigError(f"{what} of type {kind}, expected LORA: {_MERGED}")
    if not isinstance(base, str) or not base:
        raise ConfigError(
            f"{what}, and its base_model_name_or_path is {base!r}, expected a folder or a hub id: "
            "enter the model that it was trained on"
        )
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(f"{what}, and there is no {WEIGHTS}: save the adapter as safetensors")
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            f"{what} of {base}, and peft, which merges it, is not installed: "
            f"pip install megadistill[peft], or {_MERGED}"
        )
    return Adapter(folder, base, settings.get("revision"))


def changed_modules(adapter: Adapter) -> list[str]:
    """Returns the names of the base's modules whose weights merging changes, sorted."""
    from safetensors import safe_open

    with safe_open(adapter.folder / WEIGHTS, framework="pt") as file:
        names = [name.removeprefix("base_model.model.") for name in file.keys()]  # noqa: SIM118
    cut = [name.partition(".lora_")[0] if ".lora_" in name else name for name in names]
    found = {
        name if ".lora_" in full else name.rpartition(".")[0]
        for name, full in zip(cut, names, strict=True)
    }
    return sorted(found)


def merge(model: Any, adapter: Adapter, *, key: str) -> Any:
    """Returns `model` with the adapter's weights added to its own.

    model: the adapter's base, whole in this process. ConfigError where a tensor of the adapter has
    no place in it, or the adapter lacks one.
    """
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict
    from safetensors import safe_open

    try:
        wrapped = PeftModel.from_pretrained(model, adapter.folder)
        found = {name: tuple(t.shape) for name, t in get_peft_model_state_dict(wrapped).items()}
        with safe_open(adapter.folder / WEIGHTS, framework="pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if found != stored:
            names = sorted(set(found.items()) ^ set(stored.items()))
            raise ValueError(f"{names[0][0]} is in one of them alone, or has another shape")
        return wrapped.merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise ConfigError(
            f"{key}: the adapter {adapter.folder} does not fit its base {adapter.base}: "
            f"{first_line(error)}"
        ) from error
